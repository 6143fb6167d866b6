"""The data sets of the paper's evaluation, and the images of each that are measured.

Choi et al., "Adversarial Robustification via Text-to-Image Diffusion Models" (2024), A.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from models.evaluation.datasets.layouts import (
    Layout,
    Samples,
    cifar,
    class_folders,
    flowers102,
    isic2018,
    stl10,
    sun397,
    torchvision,
)

SELECTED = 500
"""About as many images are measured: every floor(N/500)-th of N."""
RESIZED, CROPPED = 256, 224
"""Pixels of the shorter side, and of the center square that is cut from it."""
CLASS_NAMES = Path(__file__).with_name("class_names.json")
"""By data set: a class's name in the layout -> its label; with the sources of both."""
TEMPLATES = Path(__file__).with_name("templates.json")
"""By data set: the paper's prompt for the diffusion model, CLIP's for zero-shot classification."""
_ISIC = "ISIC2018_Task3_Training"
_MALFORMED = (IndexError, KeyError, OSError, RuntimeError, ValueError)
"""What readers raise for files in another layout."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set: the page that it comes from, and what must lie in its `folder` below a root.

    Images at another `resolution` than the paper's crop are published at that resolution.
    """

    title: str
    layout: Layout
    source: str
    folder: str = ""
    files: tuple[str, ...] = ()
    resolution: int = CROPPED


DATASETS = {
    "imagenet": Dataset("ImageNet", class_folders("val"), "https://image-net.org"),
    "stl10": Dataset(
        "STL-10", stl10, "https://cs.stanford.edu/~acoates/stl10",
        "stl10_binary", ("test_X.bin", "test_y.bin", "class_names.txt"), 96,
    ),
    "sun397": Dataset(
        "SUN397", sun397, "https://vision.princeton.edu/projects/2010/SUN", "SUN397", ("a",),
    ),
    "cars": Dataset(
        "Stanford Cars", torchvision("StanfordCars", split="test"),
        "https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.StanfordCars.html",
        "stanford_cars", ("devkit/cars_meta.mat", "cars_test_annos_withlabels.mat", "cars_test"),
    ),
    "food101": Dataset(
        "Food-101", torchvision("Food101", split="test"),
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "food-101", ("meta/test.json", "images"),
    ),
    "pets": Dataset(
        "Oxford-IIIT Pet", torchvision("OxfordIIITPet", split="test"),
        "https://www.robots.ox.ac.uk/~vgg/data/pets",
        "oxford-iiit-pet", ("annotations/test.txt", "images"),
    ),
    "flowers102": Dataset(
        "Flowers-102", flowers102, "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        "flowers-102", ("setid.mat", "imagelabels.mat", "jpg"),
    ),
    "dtd": Dataset(
        "DTD", torchvision("DTD", split="test"), "https://www.robots.ox.ac.uk/~vgg/data/dtd",
        "dtd/dtd", ("labels/test1.txt", "images"),
    ),
    "caltech101": Dataset(
        "Caltech-101", torchvision("Caltech101"), "https://data.caltech.edu/records/20086",
        "caltech101", ("101_ObjectCategories",),
    ),
    "cropdiseases": Dataset(
        "CropDiseases", class_folders("crop-disease/train"),
        "https://www.kaggle.com/saroz014/plant-disease", "crop-disease", ("train",),
    ),
    "eurosat": Dataset(
        "EuroSAT", torchvision("EuroSAT"), "https://github.com/phelber/EuroSAT",
        "eurosat", ("2750",),
    ),
    "isic": Dataset(
        "ISIC 2018", isic2018, "https://challenge.isic-archive.com/data/#2018",
        "ISIC2018", (f"{_ISIC}_GroundTruth/{_ISIC}_GroundTruth.csv", f"{_ISIC}_Input"),
    ),
    "cifar10": Dataset(
        "CIFAR-10", cifar("cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", 1),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-10-batches-bin", ("test_batch.bin", "batches.meta.txt"), 32,
    ),
    "cifar100": Dataset(
        "CIFAR-100", cifar("cifar-100-binary", "test.bin", "fine_label_names.txt", 2),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-100-binary", ("test.bin", "fine_label_names.txt"), 32,
    ),
}  # fmt: skip


def known(name: str) -> Dataset:
    """The data set of this name; raises ValueError where there is none."""
    if (dataset := DATASETS.get(name)) is None:
        raise ValueError(f"dataset = {name!r}: must be one of {', '.join(DATASETS)}")
    return dataset


def class_names(name: str) -> dict[str, str]:
    """The labels of a data set, in the order of its classes, by their names in its layout."""
    names: dict[str, str] = json.loads(CLASS_NAMES.read_text("utf-8"))[name]["names"]
    return names


def prompt_template(name: str) -> str:
    """The sentence with {} that the paper fills for the diffusion model (method.md, section 1)."""
    return str(_templates("prompt")[name])


def clip_templates(name: str) -> tuple[str, ...]:
    """The sentences with {} that CLIP averages for zero-shot classification."""
    return tuple(_templates("clip")[name])


def _templates(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TEMPLATES.read_text("utf-8"))[kind]["templates"]
    return found


@dataclass(frozen=True, slots=True)
class Selection:
    """Every floor(N/500)-th test image of a data set; indices are those of the whole set."""

    dataset: Dataset
    samples: Samples
    names: Mapping[str, str]

    @property
    def indices(self) -> Sequence[int]:
        """The selected images; all where the set has fewer than 1,000."""
        return range(0, self.samples.count, max(1, self.samples.count // SELECTED))

    def label(self, index: int) -> str:
        """The label of an image; raises ValueError for an unreadable image and a foreign class."""
        _, found = self._sample(index)
        if found not in self.names:
            first, second, *others = self.names
            raise ValueError(
                f"{self._named(index)} is of the class {found!r}; the classes are {first!r}, "
                f"{second!r} and {len(others)} more: models/evaluation/datasets/class_names.json"
            )
        return self.names[found]

    def image(self, index: int) -> Image.Image:
        """An image (RGB) as the paper preprocesses it; raises ValueError for an unreadable one."""
        image, _ = self._sample(index)
        return preprocessed(image) if self.dataset.resolution == CROPPED else image

    def _sample(self, index: int) -> tuple[Image.Image, str]:
        try:
            return self.samples.sample(index)
        except _MALFORMED as error:
            raise ValueError(f"{self._named(index)} cannot be read: {error}") from error

    def _named(self, index: int) -> str:
        return f"image {index} of {self.dataset.title}"


def preprocessed(image: Image.Image) -> Image.Image:
    """The center 224 x 224 pixels, after the shorter side is resized to 256 (A.1)."""
    from torchvision.transforms import CenterCrop, Resize

    cropped: Image.Image = CenterCrop(CROPPED)(Resize(RESIZED)(image))
    return cropped


def select(name: str, root: Path) -> Selection:
    """The images to measure of a data set whose files lie below `root`.

    Raises ValueError for an unknown name and for files in another layout, FileNotFoundError for a
    missing file.
    """
    dataset = known(name)
    for file in dataset.files:
        path = root / dataset.folder / file
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: there is no such file; {dataset.title} has it, see {dataset.source}"
            )
    try:
        samples = dataset.layout(root)
    except _MALFORMED as error:
        raise ValueError(
            f"{root}: holds no {dataset.title} as published at {dataset.source}: {error}; "
            "docs/datasets.md has the layout"
        ) from error
    return Selection(dataset, samples, class_names(name))
