"""Twins of the data sets: small pictures of known colors, in the layouts that are published."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from models.evaluation.datasets.registry import class_names

CLASSES = 4


def twin(name: str, root: Path, count: int) -> list[str]:
    """Writes a data set's twin below `root`; returns the classes of its `count` test images."""
    names = sorted(class_names(name))
    names = names[:: len(names) // CLASSES][:CLASSES]
    labels = [index * CLASSES // count for index in range(count)]
    WRITERS[name](root, names, labels)
    return [names[label] for label in labels]


def color(index: int) -> tuple[int, int, int]:
    """The color of the twins' image of this index, below 1,280; any two are 16 levels apart."""
    return index % 16 * 16, index // 16 % 16 * 16, index // 256 * 48


def _save(path: Path, index: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), color(index)).save(path, "JPEG", quality=95)


def _small(side: int, index: int) -> Any:
    """Pixels (side, side, 3) of the image, whose upper right one is white."""
    pixels = np.full((side, side, 3), color(index), np.uint8)
    pixels[0, -1] = 255
    return pixels


def _text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _folders(place: str, pattern: str) -> Callable[[Path, Sequence[str], Sequence[int]], None]:
    def write(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
        for index, label in enumerate(labels):
            name = pattern.format(index, names[label])
            _save(root / place / names[label] / name, index)

    return write


def _stl10(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    folder = root / "stl10_binary"
    _text(folder / "class_names.txt", names)
    pixels = np.stack([_small(96, index) for index in range(len(labels))])
    pixels.transpose(0, 3, 2, 1).tofile(folder / "test_X.bin")
    (np.array(labels, np.uint8) + 1).tofile(folder / "test_y.bin")


def _cifar(folder: str, images: str, meta: str, before: bytes) -> Callable[..., None]:
    def write(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
        _text(root / folder / meta, names)
        with (root / folder / images).open("wb") as stream:
            for index, label in enumerate(labels):
                planes = _small(32, index).transpose(2, 0, 1)
                stream.write(before + bytes([label]) + planes.tobytes())

    return write


def _sun397(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    for index, label in enumerate(labels):
        folder = root / "SUN397" / names[label][0] / names[label]
        _save(folder / f"sun_{index:05d}.jpg", index)
    (root / "SUN397" / "a").mkdir(exist_ok=True)


def _cars(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    files = [f"{index + 1:05d}.jpg" for index in range(len(labels))]
    for index, file in enumerate(files):
        _save(root / "stanford_cars" / "cars_test" / file, index)
    rows = [(file, label + 1) for file, label in zip(files, labels, strict=True)]
    annotations = np.array(rows, dtype=[("fname", object), ("class", object)])
    savemat(root / "stanford_cars" / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    (root / "stanford_cars" / "devkit").mkdir()
    savemat(
        root / "stanford_cars" / "devkit" / "cars_meta.mat",
        {"class_names": np.array(names, dtype=object)},
    )


def _food101(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    listed: dict[str, list[str]] = {}
    for index, label in enumerate(labels):
        listed.setdefault(names[label], []).append(place := f"{names[label]}/{index}")
        _save(root / "food-101" / "images" / f"{place}.jpg", index)
    _text(root / "food-101" / "meta" / "test.json", [json.dumps(listed)])


def _pets(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    files = [f"{names[label]}_{index}".replace(" ", "_") for index, label in enumerate(labels)]
    for index, file in enumerate(files):
        _save(root / "oxford-iiit-pet" / "images" / f"{file}.jpg", index)
    lines = [f"{file} {label + 1} 1 1" for file, label in zip(files, labels, strict=True)]
    _text(root / "oxford-iiit-pet" / "annotations" / "test.txt", lines)


def _flowers102(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Ten training images come first."""
    folder = root / "flowers-102"
    for index in range(len(labels)):
        _save(folder / "jpg" / f"image_{index + 11:05d}.jpg", index)
    numbers = [1] * 10 + [int(names[label]) for label in labels]
    savemat(folder / "imagelabels.mat", {"labels": np.array(numbers, np.uint8)})
    savemat(folder / "setid.mat", {"tstid": np.arange(11, 11 + len(labels), dtype=np.uint16)})


def _dtd(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    files = [f"{names[label]}/{names[label]}_{index}.jpg" for index, label in enumerate(labels)]
    for index, file in enumerate(files):
        _save(root / "dtd" / "dtd" / "images" / file, index)
    _text(root / "dtd" / "dtd" / "labels" / "test1.txt", files)


def _caltech101(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Numbers begin at 1 in each folder; the background is no class."""
    folder = root / "caltech101" / "101_ObjectCategories"
    for index, label in enumerate(labels):
        _save(folder / names[label] / f"image_{index - labels.index(label) + 1:04d}.jpg", index)
    _save(folder / "BACKGROUND_Google" / "image_0001.jpg", 0)


def _isic(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    truth = root / "ISIC2018" / "ISIC2018_Task3_Training_GroundTruth"
    truth.mkdir(parents=True)
    columns = list(class_names("isic"))
    with (truth / f"{truth.name}.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["image", *columns])
        for index, label in enumerate(labels):
            marks = [1.0 if column == names[label] else 0.0 for column in columns]
            table.writerow([f"ISIC_{index:07d}", *marks])
            folder = root / "ISIC2018" / "ISIC2018_Task3_Training_Input"
            _save(folder / f"ISIC_{index:07d}.jpg", index)


WRITERS: dict[str, Callable[[Path, Sequence[str], Sequence[int]], None]] = {
    "imagenet": _folders("val", "ILSVRC2012_val_{:08d}.JPEG"),
    "stl10": _stl10,
    "sun397": _sun397,
    "cars": _cars,
    "food101": _food101,
    "pets": _pets,
    "flowers102": _flowers102,
    "dtd": _dtd,
    "caltech101": _caltech101,
    "cropdiseases": _folders("crop-disease/train", "{:05d}.JPG"),
    "eurosat": _folders("eurosat/2750", "{1}_{0:05d}.jpg"),
    "isic": _isic,
    "cifar10": _cifar("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", b""),
    "cifar100": _cifar("cifar-100-binary", "test.bin", "fine_label_names.txt", b"\x07"),
}
"""By data set; each writes the layout and nothing that the reader does not need."""
