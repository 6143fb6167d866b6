"""Classifiers with gradients, for fine-tuning: each as its loader serves it, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifiers import open_clip, timm, transformers


class Tunable(Protocol):
    """A classifier to train: x (B,3,H,W) in [0,1] -> logits (B,K). Its `network` is stored."""

    network: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B,K) by row, with gradients."""


class _Clip:
    """Both encoders of a CLIP; the scale of its logits is fixed."""

    def __init__(
        self, folder: Path, labels: Sequence[str], template: str, device: torch.device
    ) -> None:
        self._clip, tokenizer = open_clip.read_open_clip(folder, device)
        self._clip.logit_scale.requires_grad_(False)
        self._words = tokenizer([template.format(label) for label in labels]).to(device)
        self._preprocess = open_clip.preprocess_of(self._clip, torch.float32)
        self.network: nn.Module = self._clip

    def __call__(self, x: Tensor) -> Tensor:
        image = self._clip.encode_image(self._preprocess(x)).float()
        text = self._clip.encode_text(self._words).float()
        with torch.autocast(x.device.type, enabled=False):
            cosine = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
            logits: Tensor = self._clip.logit_scale.exp() * cosine
        return logits


class _Timm:
    """All weights of a timm network."""

    def __init__(
        self, folder: Path, labels: Sequence[str], template: str, device: torch.device
    ) -> None:
        self.network = timm.read_timm(folder).to(device)
        self._preprocess = timm.preprocess_of(self.network)

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self._preprocess(x)).float()
        return logits


class _Logits:
    """All weights of an image classifier of transformers."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._logits = transformers.read_logits(folder).to(device)
        self.network: nn.Module = self._logits.model
        like = torch.empty(0, device=device)
        self._preprocess = transformers.preprocess_of(folder, like)

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self._logits(self._preprocess(x)).float()
        return logits


class _ZeroShot:
    """Both towers of a CLIP or SigLIP of transformers; scale and bias of its logits are fixed."""

    def __init__(
        self, folder: Path, labels: Sequence[str], template: str, device: torch.device
    ) -> None:
        model = transformers.read_zero_shot(folder).to(device)
        self._scale = model.logit_scale.requires_grad_(False)
        self._bias = torch.zeros(1, device=device)
        if hasattr(model, "logit_bias"):
            self._bias = model.logit_bias.requires_grad_(False)
        self._model, self._image = model, transformers.ImageFeatures(model)
        self._words = transformers.tokenized(folder, [template.format(each) for each in labels])
        self._preprocess = transformers.preprocess_of(folder, torch.empty(0, device=device))
        self.network: nn.Module = model

    def __call__(self, x: Tensor) -> Tensor:
        image = self._image(self._preprocess(x)).float()
        text = transformers.text_features(self._model, self._words).float()
        with torch.autocast(x.device.type, enabled=False):
            cosine = F.normalize(image, dim=-1) @ text.T
            logits: Tensor = self._scale.exp() * cosine + self._bias
        return logits


def _transformers(
    folder: Path, labels: Sequence[str], template: str, device: torch.device
) -> Tunable:
    if transformers.is_zero_shot(folder):
        return _ZeroShot(folder, labels, template, device)
    return _Logits(folder, device)


TUNABLES: dict[str, Callable[[Path, Sequence[str], str, torch.device], Tunable]] = {
    "open-clip": _Clip,
    "timm": _Timm,
    "transformers": _transformers,
}
"""The kinds of CLASSIFIERS that can be fine-tuned, `kinds.TUNABLE_KINDS`."""
