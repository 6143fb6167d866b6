"""FFDNet, a plain regression denoiser that is given sigma (Zhang et al. 2018).

A smoothed classifier behind such a denoiser is Salman et al. 2020, arXiv 2003.01908.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.denoisers.base import Denoiser
from models.runtime import Runtime

_CHANNELS = 3
_FACTOR = 2
"""Pixels are unshuffled in blocks of 2x2."""
_NAME = re.compile(r"model\.(\d+)\.(weight|bias)")


class FFDNet(nn.Module):
    """3x3 convolutions with ReLU between them, on unshuffled pixels beside a map of sigma.

    x (B,3,H,W) in [0,1] units and sigma (B,1,1,1) -> an estimate (B,3,H,W). `widths` are the
    channels from the first convolution's input to the last one's output. The layout of layers, and
    so the names of weights, is KAIR's.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate; images of an odd side are padded by a repeated row or column."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, width % _FACTOR, 0, height % _FACTOR), mode="replicate")
        folded = F.pixel_unshuffle(padded, _FACTOR)
        noise = sigma.expand(-1, 1, *folded.shape[-2:])
        estimate = F.pixel_shuffle(self.model(torch.cat([folded, noise], 1)), _FACTOR)
        return estimate[..., :height, :width]


class FFDNetDenoiser:
    """FFDNet at any sigma; outside the range of its training (75 gray levels) it still answers."""

    largest_sigma = float("inf")

    def __init__(self, network: nn.Module, runtime: Runtime) -> None:
        self._dtype = next(network.parameters()).dtype
        self._network = runtime.prepare(network)

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser`."""
        given = sigma.to(x_hat.device, self._dtype)[:, None, None, None]
        estimate = self._network(x_hat.to(self._dtype), given)
        return estimate.to(x_hat.dtype).clamp(0, 1)


def read_ffdnet(path: Path) -> FFDNet:
    """A color FFDNet in float32, its depth and widths as in the safetensors file.

    Raises ValueError for weights of another layout.
    """
    weights = load_file(path)
    numbers = {int(found[1]) for name in weights if (found := _NAME.fullmatch(name))}
    shapes = [tuple(weights[f"model.{n}.weight"].shape) for n in sorted(numbers)]
    widths = [shape[1] for shape in shapes] + [shape[0] for shape in shapes[-1:]]
    folded = _CHANNELS * _FACTOR**2
    if len(weights) != 2 * len(numbers) or [*widths[:1], *widths[-1:]] != [folded + 1, folded]:
        raise ValueError(
            f"{path}: is not a color FFDNet in KAIR's layout: convolutions model.0, model.2, ... "
            f"from {folded + 1} channels to {folded}, each with weight and bias"
        )
    network = FFDNet(widths)
    network.load_state_dict(weights)
    return network.eval()


def load_ffdnet(
    folder: Path,
    states: Any,
    k: float,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    adapter: Path | None = None,
) -> Denoiser:
    """A denoiser from the folder's `model.safetensors`; `states`, `k` and `adapter` do not matter.

    Raises ValueError for weights of another layout.
    """
    network = read_ffdnet(folder / "model.safetensors").requires_grad_(False)
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    return FFDNetDenoiser(network, runtime)
