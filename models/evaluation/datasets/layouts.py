"""Readers of the test images of data sets, in the layouts in which these are published."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, slots=True)
class Samples:
    """Test images in a fixed order: `sample` has an image (RGB) and its class, by index.

    The class is named as in the layout: a folder, a line of a file, a column.
    """

    count: int
    sample: Callable[[int], tuple[Image.Image, str]]


Layout: TypeAlias = Callable[[Path], Samples]
"""A reader of the layout below a folder; it may raise any error for what is not the layout."""


def torchvision(kind: str, **options: str) -> Layout:
    """The layout of one of torchvision's classes.

    Not for CIFAR, which torchvision unpickles; nor for SUN397, whose order it leaves to the file
    system; nor for STL-10 and Flowers-102, whose twins have other hashes than it demands.
    """

    def read(root: Path) -> Samples:
        from torchvision import datasets

        found = getattr(datasets, kind)(root, **options)
        classes = found.categories if kind == "Caltech101" else found.classes
        return Samples(len(found), lambda index: _named(found[index], classes))

    return read


def class_folders(below: str) -> Layout:
    """A folder of images for each class in the folder `below`, or in the root without it."""

    def read(root: Path) -> Samples:
        folder = root / below if (root / below).is_dir() else root
        try:
            return torchvision("ImageFolder")(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} needs a folder of images for each class ({error})"
            ) from error

    return read


def cifar(folder: str, images: str, names: str, label_bytes: int) -> Layout:
    """CIFAR's binary version: records of label bytes, the last of which counts, and pixels."""

    def read(root: Path) -> Samples:
        content = np.memmap(root / folder / images, np.uint8, "r")
        records = content.reshape(-1, label_bytes + 3 * 32 * 32)
        classes = (root / folder / names).read_text().split()
        pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return _in_memory(pixels, records[:, label_bytes - 1], classes)

    return read


def stl10(root: Path) -> Samples:
    """STL-10's binary version: pixels column by column, and labels from 1."""
    folder = root / "stl10_binary"
    pixels = np.memmap(folder / "test_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96)
    labels = np.fromfile(folder / "test_y.bin", np.uint8) - 1
    classes = (folder / "class_names.txt").read_text().split()
    return _in_memory(pixels.transpose(0, 3, 2, 1), labels, classes)


def flowers102(root: Path) -> Samples:
    """Flowers-102: files by number; MATLAB files with their classes and the test set's numbers."""
    from scipy.io import loadmat

    folder = root / "flowers-102"
    numbers = loadmat(folder / "setid.mat", squeeze_me=True)["tstid"].tolist()
    labels = loadmat(folder / "imagelabels.mat", squeeze_me=True)["labels"].tolist()
    return _files(
        [folder / "jpg" / f"image_{number:05d}.jpg" for number in numbers],
        [str(labels[number - 1]) for number in numbers],
    )


def sun397(root: Path) -> Samples:
    """SUN397: nested folders below one of each letter; all images, sorted by their paths."""
    folder = root / "SUN397"
    paths = sorted(folder.rglob("sun_*.jpg"))
    return _files(paths, ["/".join(path.relative_to(folder).parts[1:-1]) for path in paths])


def isic2018(root: Path) -> Samples:
    """ISIC 2018, task 3: files by name, and a CSV with a column of ones and zeros for each class.

    The training images, as in the paper: those of the test set were published without classes.
    """
    folder = root / "ISIC2018"
    truth = "ISIC2018_Task3_Training_GroundTruth"
    with (folder / truth / f"{truth}.csv").open(newline="", encoding="utf-8-sig") as stream:
        lines = [(line.pop("image"), line) for line in csv.DictReader(stream)]
    return _files(
        [folder / "ISIC2018_Task3_Training_Input" / f"{name}.jpg" for name, _ in lines],
        [_marked(line) for _, line in lines],
    )


def _marked(line: Mapping[str, str]) -> str:
    """The one column that is not zero; raises ValueError if there are none or several."""
    (column,) = (column for column, value in line.items() if float(value))
    return column


def _named(sample: tuple[Image.Image, int], classes: Sequence[str]) -> tuple[Image.Image, str]:
    image, label = sample
    return image.convert("RGB"), classes[label]


def _files(paths: Sequence[Path], classes: Sequence[str]) -> Samples:
    return Samples(
        len(paths), lambda index: (Image.open(paths[index]).convert("RGB"), classes[index])
    )


def _in_memory(pixels: NDArray[np.uint8], labels: NDArray[Any], classes: Sequence[str]) -> Samples:
    """Samples of `pixels` (N,H,W,3); `labels` (N,) are indices into `classes`."""
    if len(pixels) != len(labels):
        raise ValueError(f"there are {len(pixels)} images and {len(labels)} labels")
    return Samples(
        len(pixels), lambda index: (Image.fromarray(pixels[index]), classes[labels[index]])
    )
