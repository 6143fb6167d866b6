"""Networks of timm in its own folder layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.classifiers.base import Classifier, Description, Preprocess, check_count
from models.runtime import Runtime


class TimmClassifier:
    """A timm network with its own normalization, resolution and labels."""

    def __init__(self, model: nn.Module, labels: Sequence[str], runtime: Runtime) -> None:
        self.labels = tuple(labels)
        self._model = runtime.prepare(model)
        self._preprocess = preprocess_of(model)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        logits: Tensor = self._model(self._preprocess(x)).float()
        return logits


def preprocess_of(model: nn.Module) -> Preprocess:
    """The preprocessing of a timm network's configuration, into its own dtype."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    like = next(model.parameters())
    mode = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    return Preprocess(config["input_size"][-1], config["mean"], config["std"], like, mode)


def describe_timm(folder: Path) -> Description:
    """The input's side and the labels of a folder in timm's layout, where they are stated."""
    described = json.loads((folder / "config.json").read_text())
    names = described.get("label_names") or described["pretrained_cfg"].get("label_names")
    height, width = described["pretrained_cfg"]["input_size"][1:]
    if height != width:
        raise ValueError(f"{folder}: the network takes {height}x{width} pixels, not a square")
    return Description(int(width), tuple(map(str, names)) if names else None)


def read_timm(folder: Path, tuned: Path | None = None) -> nn.Module:
    """A timm network in float32, from a folder with timm's `config.json` and `model.safetensors`.

    Weights in a `tuned` file replace the folder's. Raises ValueError for an architecture that timm
    does not have itself: it would look for others at the hub.
    """
    import timm

    import models.zoo.vision  # noqa: F401 - registers its towers with timm

    described = json.loads((folder / "config.json").read_text())
    settings = {**described.get("model_args", {}), "num_classes": described["num_classes"]}
    overlay = described["pretrained_cfg"]
    if not timm.is_model(described["architecture"]):
        raise ValueError(f"{folder}: timm has no architecture {described['architecture']!r}")
    model = timm.create_model(described["architecture"], pretrained_cfg_overlay=overlay, **settings)
    model.load_state_dict(load_file(tuned or folder / "model.safetensors"))
    return model.eval()


def load_timm(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    tuned: Path | None = None,
) -> Classifier:
    """A classifier of `read_timm`'s network; `template` is not used.

    Raises ValueError where the network has other than one class a label.
    """
    model = read_timm(folder, tuned).requires_grad_(False)
    check_count(folder, model.num_classes, labels)  # type: ignore[arg-type]
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    return TimmClassifier(model, labels, runtime)
