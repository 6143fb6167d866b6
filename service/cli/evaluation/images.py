"""Labeled images of an evaluation: class folders, a CSV, a data set, a sheet of small images."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.evaluation.datasets.cifar10 import SLICE, LabelledImages, cifar10, evaluation_slice
from models.evaluation.datasets.registry import Selection, select
from service.cli.files import pictures
from service.errors import Problem
from service.predictions.images.reader import ImageLimits, decode
from service.predictions.verification import MOST_PIXELS

MOST_NAMED = 10
"""Most labels or files that one message names."""


@dataclass(frozen=True, slots=True)
class LabeledFile:
    """One image: its place in the whole set, its name, what it shows, and its file's content."""

    index: int
    name: str
    label: str
    read: Callable[[], bytes]

    def pixels(self, resolution: int) -> NDArray[np.uint8]:
        """The image as tasks of this resolution see it, (3,R,R), whatever its size.

        Raises ValueError, naming the file, for one that is no usable image.
        """
        content = self.read()
        try:
            return decode(content, resolution, ImageLimits(len(content), MOST_PIXELS))
        except Problem as problem:
            raise ValueError(f"{self.name}: {problem}") from problem


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images from `source`, which has `total`; those of a data set have no label but `labels`.

    Of a `shared` set, images of labels that a task lacks are left out. Only sheets are shared: they
    serve every task of some of their labels.
    """

    source: str
    files: Sequence[LabeledFile]
    total: int
    labels: Sequence[str] = ()
    shared: bool = False

    def chosen(self, labels: Sequence[Sequence[str]], limit: int | None) -> list[LabeledFile]:
        """The images to evaluate tasks with these labels on, `limit` of them evenly spread.

        Raises ValueError for an image of another label, a data set's label that a task lacks, and
        where no image is left.
        """
        common = [label for label in labels[0] if all(label in own for own in labels[1:])]
        named = {_plain(label): label for label in reversed(common)}
        if lacking := next((each for each in self.labels if _plain(each) not in named), None):
            raise ValueError(f"{self.source}: {_unknown(lacking, common)}")
        found = []
        for file in self.files:
            label = file.label if file.label in common else named.get(_plain(file.label))
            if label is not None:
                found.append(LabeledFile(file.index, file.name, label, file.read))
            elif not self.shared:
                raise ValueError(f"{file.name}: {_unknown(file.label, common)}")
        if not found:
            raise ValueError(f"{self.source}: no image shows one of {_listed(common)}")
        step = len(found) // min(limit or len(found), len(found))
        return found[::step][:limit]


def read_images(path: Path | None) -> ImageSet:
    """The images at `path`; the shipped slice where it is None.

    `path` is a folder with a sub-folder of pictures for each label, a CSV of paths and labels, or a
    sheet of one 32x32 image a row with its labels as JSON beside it.

    Raises OSError for a missing or unreadable file, and ValueError for a malformed one.
    """
    if path is None:
        return _sheet(evaluation_slice(SLICE), "the shipped slice")
    if path.is_dir():
        return _folders(path)
    if path.suffix.lower() == ".csv":
        return _listed_files(path)
    if path.with_suffix(".json").exists() and path.suffix.lower() == ".png":
        return _sheet(evaluation_slice(path), path.name)
    path.open("rb").close()
    raise ValueError(
        f"{path}: must be a folder with a sub-folder of pictures for each label, or a .csv of "
        "paths and labels"
    )


def dataset_images(name: str, root: Path) -> ImageSet:
    """The test images of a data set that the paper's evaluation takes, preprocessed as there.

    Raises as `select` does, and ValueError for an image that cannot be read.
    """
    try:
        found = select(name, root)
        files = [
            LabeledFile(
                index, f"image {index}", found.label(index), partial(_preprocessed, found, index)
            )
            for index in found.indices
        ]
    except ImportError as error:
        raise ValueError(
            f"dataset = {name!r} cannot be read ({error}): pip install '.[torch]' in the checkout"
        ) from error
    labels = list(found.names.values())
    return ImageSet(found.dataset.title, files, found.samples.count, labels)


def held_back(folder: Path) -> ImageSet:
    """The training images that were held back from nano; `folder` as for `cifar10`."""
    return _sheet(cifar10(folder, "held-back"), "CIFAR-10, held back")


def digest(files: Sequence[LabeledFile]) -> str:
    """SHA-256 (hex) of the images' indices, labels and contents."""
    whole = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read()).hexdigest()
        whole.update(f"{file.index}\t{file.label}\t{content}\n".encode())
    return whole.hexdigest()


def check(files: Sequence[LabeledFile], resolution: int) -> None:
    """Raises ValueError that names the files, ten at most, which are no usable images."""
    reasons = []
    for file in files:
        try:
            file.pixels(resolution)
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        more = len(reasons) - MOST_NAMED
        reasons[MOST_NAMED:] = [f"{more} more"] if more > 0 else []
        raise ValueError("; ".join(reasons))


def _folders(folder: Path) -> ImageSet:
    classes = sorted(
        each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    if not classes:
        raise ValueError(f"{folder}: has no sub-folder; each label needs one with its pictures")
    found = [(each.name, path) for each in classes for path in pictures([str(each)])]
    files = [
        LabeledFile(index, path.relative_to(folder).as_posix(), label, path.read_bytes)
        for index, (label, path) in enumerate(found)
    ]
    return ImageSet(str(folder), files, len(files))


def _listed_files(table: Path) -> ImageSet:
    """A CSV's images: the columns `path` and `label`, or the first two where it has no header."""
    with table.open(newline="", encoding="utf-8-sig") as stream:
        try:
            lines = [line for line in csv.reader(stream) if line]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{table}: is no CSV in UTF-8: {error}") from error
    heads = [word.strip().lower() for word in lines[0]] if lines else []
    columns = (0, 1)
    if "path" in heads and "label" in heads:
        columns = (heads.index("path"), heads.index("label"))
        del lines[0]
    if not lines:
        raise ValueError(f"{table}: has no line with a path and a label")
    files = []
    for index, line in enumerate(lines):
        if len(line) <= max(columns):
            raise ValueError(f"{table}: {','.join(line)!r} has no path and label")
        name, label = (line[column].strip() for column in columns)
        path = table.parent / name
        path.open("rb").close()
        files.append(LabeledFile(index, name, label, path.read_bytes))
    return ImageSet(str(table), files, len(files))


def _sheet(data: LabelledImages, source: str) -> ImageSet:
    files = [
        LabeledFile(index, f"image {index}", data.names[label], partial(_small, data, index))
        for index, label in enumerate(data.labels.tolist())
    ]
    return ImageSet(source, files, len(files), shared=True)


def _small(data: LabelledImages, index: int) -> bytes:
    return _png(Image.fromarray(data.images[index]))


def _preprocessed(found: Selection, index: int) -> bytes:
    return _png(found.image(index))


def _png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _plain(label: str) -> str:
    """A label as a folder's name may write it: case, underscores and hyphens do not count."""
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


def _unknown(label: str, labels: Sequence[str]) -> str:
    near = get_close_matches(_plain(label), [_plain(each) for each in labels], 1)
    meant = next((each for each in labels if near and _plain(each) == near[0]), None)
    advice = f"did you mean {meant!r}?" if meant else f"the labels are {_listed(labels)}"
    return f"{label!r} is no label of the task; {advice}"


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - MOST_NAMED
    return ", ".join(labels[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
