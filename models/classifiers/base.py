"""The classifiers' protocol, their preprocessing, and what a network's folder says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.runtime import Runtime


class Classifier(Protocol):
    """x (B,3,H,W) float32 in [0,1] units -> logits (B,K) float32; `labels` name the K columns."""

    labels: tuple[str, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B,K) by row; rows do not affect one another."""


class ZeroShot(Classifier, Protocol):
    """A classifier whose logits are `scale` times the cosine of image and words, plus `bias`."""

    scale: float
    bias: float


Loader = Callable[
    [Path, Sequence[str], str, torch.device, torch.dtype, Runtime, Path | None], Classifier
]
"""Loads a classifier: folder, labels' words, template, device, dtype, runtime, tuned weights."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a network's folder says: its input's side in pixels, and its labels if it names any.

    A zero-shot head `takes_words`: any labels.
    """

    resolution: int
    labels: tuple[str, ...] | None = None
    takes_words: bool = False


class Preprocess:
    """Resize with antialiasing (`mode`: bicubic or bilinear), then the network's mean and std."""

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        like: Tensor,
        mode: str = "bicubic",
    ) -> None:
        self._size = size
        self._mode = mode
        self._mean = torch.tensor(mean, device=like.device)[:, None, None]
        self._std = torch.tensor(std, device=like.device)[:, None, None]
        self._dtype = like.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) in [0,1] -> the network's input."""
        if x.shape[-2:] != (self._size, self._size):
            x = F.interpolate(x, size=(self._size,) * 2, mode=self._mode, antialias=True)
        scaled = (x - self._mean.to(x.dtype)) / self._std.to(x.dtype)
        return scaled.to(self._dtype)


def similarities(features: Tensor, prototypes: Tensor) -> Tensor:
    """Products (B,K) of normalized features (B,D) with prototypes (K,D).

    Row by row: a product of several may round each by its place (docs/decisions/0001).
    """
    return torch.stack([prototypes.mv(row) for row in F.normalize(features.float(), dim=-1)])


def check_count(folder: Path, classes: int, labels: Sequence[str]) -> None:
    """Raises ValueError where a network has other than one class a label."""
    if classes != len(labels):
        raise ValueError(
            f"{folder}: the network has {classes} classes, and there are {len(labels)} labels"
        )
