"""The auxiliary network of adversarial guidance: a small residual network, and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from models.files import written_whole

CONFIG, WEIGHTS = "config.json", "model.safetensors"
STEM = 64
"""Channels of timm's stem."""


class Auxiliary(nn.Module):
    """x_t (B,3,32,32) in [-1,1] units, never clipped -> logits (B,K).

    timm's ResNet-18 with other `channels` of its four stages, and a 3x3 stem without pooling. It
    takes no timestep: it is trained at noise ratios from 0 to `largest_ratio`.
    """

    def __init__(self, classes: int, channels: tuple[int, ...], largest_ratio: float) -> None:
        super().__init__()
        block: Any = BasicBlock
        network: Any = ResNet(block, (2, 2, 2, 2), num_classes=classes, channels=channels)
        network.conv1 = nn.Conv2d(3, STEM, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        self.network = network
        self.classes, self.channels, self.largest_ratio = classes, channels, largest_ratio

    def forward(self, x_t: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.network(x_t)
        return logits

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        config = {
            "classes": self.classes,
            "channels": self.channels,
            "largest_ratio": self.largest_ratio,
        }
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(folder / CONFIG) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n")
        with written_whole(folder / WEIGHTS) as partial:
            save_file({n: t.contiguous() for n, t in self.state_dict().items()}, partial)


def read_auxiliary(folder: Path, classes: int, device: torch.device) -> Auxiliary:
    """The network that `models.purification.train` wrote, at rest.

    Raises ValueError for a folder without one, and for one of another number of classes.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        network = Auxiliary(
            config["classes"], tuple(config["channels"]), float(config["largest_ratio"])
        )
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder}: has no auxiliary network: {error}") from error
    if network.classes != classes:
        raise ValueError(
            f"{folder}: its network has {network.classes} classes; the task has {classes}"
        )
    return network.to(device).eval().requires_grad_(False)
