"""Classifiers: from images in [0,1] to logits, each with its own resolution, scale and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import open_clip
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import models.vision  # noqa: F401 - registers with timm
from models.runtime import Runtime


class Classifier(Protocol):
    """x (B,3,H,W) float32 in [0,1] units -> logits (B,K) float32; `labels` name the K columns."""

    labels: tuple[str, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits a row; rows do not touch one another."""


class _Preprocess:
    """Bicubic resize with antialiasing, as CLIP's own, then the network's mean and deviation."""

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], like: Tensor
    ) -> None:
        self._size = size
        self._mean = torch.tensor(mean, device=like.device)[:, None, None]
        self._std = torch.tensor(std, device=like.device)[:, None, None]
        self._dtype = like.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self._size, self._size):
            x = F.interpolate(x, size=(self._size,) * 2, mode="bicubic", antialias=True)
        scaled = (x - self._mean.to(x.dtype)) / self._std.to(x.dtype)
        return scaled.to(self._dtype)


class OpenClipClassifier:
    """Zero-shot CLIP: cosine similarity to each label's prompt, times exp(logit scale).

    Text features are computed once from `template.format(label)`; the text tower is then let go.
    Source: method.md 1.7.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: Any,
        labels: Sequence[str],
        template: str,
        dtype: torch.dtype,
        runtime: Runtime,
    ) -> None:
        self.labels = tuple(labels)
        device = model.logit_scale.device
        words = tokenizer([template.format(label) for label in self.labels]).to(device)
        with torch.no_grad():
            text = model.encode_text(words, normalize=True)
            self._prototypes = model.logit_scale.exp() * text
        self._visual = runtime.prepare(
            model.visual.to(dtype=dtype, memory_format=torch.channels_last)
        )
        described: dict[str, Any] = model.visual.preprocess_cfg
        size = described["size"]
        self._preprocess = _Preprocess(
            size if isinstance(size, int) else size[-1], described["mean"], described["std"],
            torch.empty(0, dtype=dtype, device=device),
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        features = F.normalize(self._visual(self._preprocess(x)).float(), dim=-1)
        logits: Tensor = features @ self._prototypes.T
        return logits


class TimmClassifier:
    """A timm network with its own normalisation, resolution and labels."""

    def __init__(self, model: nn.Module, labels: Sequence[str], runtime: Runtime) -> None:
        self.labels = tuple(labels)
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self._model = runtime.prepare(model)
        self._preprocess = _Preprocess(
            config["input_size"][-1], config["mean"], config["std"], next(model.parameters())
        )

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        logits: Tensor = self._model(self._preprocess(x)).float()
        return logits


def load_open_clip(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
) -> Classifier:
    """A CLIP from a folder with `open_clip_config.json` and `open_clip_model.safetensors`.

    Any label will do: it becomes a prompt through `template`.
    """
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, precision="fp32", device=device)
    tokenizer = open_clip.get_tokenizer(name)
    return OpenClipClassifier(
        model.requires_grad_(False).eval(), tokenizer, labels, template, dtype, runtime
    )


def load_timm(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
) -> Classifier:
    """A timm network from a folder with timm's `config.json` and `model.safetensors`.

    Its labels are `label_names` of the configuration; `labels` must be those. Raises ValueError
    where they differ. `template` is not used.
    """
    described = json.loads((folder / "config.json").read_text())
    own = tuple(described.get("label_names") or ())
    if own != tuple(labels):
        raise ValueError(f"{folder}: the network's labels are {own}, the task's {tuple(labels)}")
    model = timm.create_model(
        described["architecture"],
        num_classes=described["num_classes"],
        pretrained_cfg_overlay=described["pretrained_cfg"],
        **described.get("model_args", {}),
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    return TimmClassifier(model.requires_grad_(False).eval(), own, runtime)


Loader = Callable[[Path, Sequence[str], str, torch.device, torch.dtype, Runtime], Classifier]
CLASSIFIERS: dict[str, Loader] = {
    "open-clip": load_open_clip,
    "timm": load_timm,
}
"""Where to add a classifier: one adapter above and one line here."""
