"""models/evaluation/datasets: layouts, class names, templates, and the images that are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_clip import zero_shot_metadata
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets

from models.adaptation.limits import checked_labels, checked_template
from models.evaluation.datasets import layouts
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.evaluation.datasets.registry import (
    DATASETS,
    Selection,
    class_names,
    clip_templates,
    preprocessed,
    prompt_template,
    select,
)
from tests.support.datasets import WRITERS, color, twin
from tests.support.paths import ROOT, SHARED

COUNT = 1004
"""Images of a twin; floor(1004 / 500) is 2, so every second is selected."""
PUBLISHED = {
    "imagenet": 1000, "stl10": 10, "sun397": 397, "cars": 196, "food101": 101, "pets": 37,
    "flowers102": 102, "dtd": 47, "caltech101": 101, "cropdiseases": 38, "eurosat": 10, "isic": 7,
    "cifar10": 10, "cifar100": 100,
}  # fmt: skip
"""Classes of each data set, as its authors state them."""
LOG = SHARED / "oracles" / "imagenet_paper_certified_sigma_0.25.tsv"


@pytest.mark.parametrize("name", DATASETS)
def test_a_twin_is_read_as_its_layout_says(name: str, tmp_path: Path) -> None:
    """Images, labels by index, every floor(N/500)-th, the resolution, colors and orientation."""
    classes = twin(name, tmp_path, COUNT)
    found = select(name, tmp_path)
    assert found.samples.count == COUNT
    assert list(found.indices) == list(range(0, COUNT, 2))
    labels = class_names(name)
    assert [found.label(index) for index in found.indices] == [labels[c] for c in classes[::2]]
    side = {"stl10": 96, "cifar10": 32, "cifar100": 32}.get(name, 224)
    for index in (0, 502, 1002):
        pixels: Any = np.asarray(found.image(index), dtype=int)
        assert pixels.shape == (side, side, 3)
        assert np.abs(pixels[-1, 0] - color(index)).max() <= 4
        assert (pixels[0, -1] == 255).all() == (side < 224)


def test_the_shape_of_the_registry() -> None:
    """Names, templates and twins are there for every data set; sources are named."""
    assert set(DATASETS) == set(PUBLISHED) == set(WRITERS)
    for name, classes in PUBLISHED.items():
        labels = list(class_names(name).values())
        assert len(checked_labels(labels)[0]) == classes
        for template in (prompt_template(name), *clip_templates(name)):
            assert checked_template(template) == template
        assert DATASETS[name].source.startswith("https://")


def test_the_page_has_every_data_set() -> None:
    """docs/datasets.md has the labels, resolution, template, files and source of each."""
    lines = (ROOT / "docs" / "datasets.md").read_text().splitlines()
    for name, dataset in DATASETS.items():
        measured, files = (line for line in lines if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in measured.split("|")]
        assert dataset.title in measured
        assert cells[5] == str(dataset.resolution)
        assert cells[6] == f"{PUBLISHED[name]:,}"
        assert cells[7] == prompt_template(name)
        whole, selected = (int(cell.replace(",", "")) for cell in cells[3:5])
        assert selected == len(range(0, whole, whole // 500))
        assert f"({dataset.source})" in files
        assert all(f"`{part}`" in files for part in (dataset.folder, *dataset.files) if part)


def test_names_are_those_of_the_libraries() -> None:
    """ImageNet's of open_clip and timm, but two double names; Flowers' of torchvision, but three.

    open_clip has "missile" and "sunglasses" twice each. CLIP renamed three of the flowers.
    """
    imagenet = class_names("imagenet")
    assert list(imagenet) == ImageNetInfo().label_names()
    pairs = zip(imagenet.items(), zero_shot_metadata.IMAGENET_CLASSNAMES, strict=True)
    assert [(key, name, other) for (key, name), other in pairs if name != other] == [
        ("n04008634", "projectile", "missile"),
        ("n04355933", "sunglass", "sunglasses"),
    ]
    flowers = class_names("flowers102")
    assert list(flowers) == [str(number) for number in range(1, 103)]
    pairs = zip(flowers.values(), datasets.Flowers102.classes, strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == [
        ("globe flower", "globe-flower"),
        ("pink and yellow dahlia", "pink-yellow dahlia?"),
        ("air plant", "ball moss"),
    ]
    assert tuple(class_names("cifar10").values()) == CIFAR10_LABELS
    templates = tuple(each("{}") for each in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES)
    assert clip_templates("imagenet") == templates


def test_torchvision_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STL-10 and Flowers-102: without its hashes, torchvision has the same pixels and classes."""
    for module in ("stl10", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    twin("stl10", tmp_path, 8)
    (tmp_path / "stl10_binary" / "fold_indices.txt").write_text("0\n")
    twin("flowers102", tmp_path, 8)
    for ours, theirs in (
        (layouts.stl10(tmp_path), datasets.STL10(tmp_path, "test")),
        (layouts.flowers102(tmp_path), datasets.Flowers102(tmp_path, "test")),
    ):
        assert ours.count == len(theirs)
        for index in range(8):
            (image, name), (other, label) = ours.sample(index), theirs[index]
            assert (np.asarray(image) == np.asarray(other)).all()
            assert name == (str(label + 1) if len(theirs.classes) == 102 else theirs.classes[label])


@pytest.mark.skipif(not LOG.exists(), reason="needs the published logs")
def test_the_papers_log_has_the_same_images() -> None:
    """The images of ImageNet, and their labels: 50 images a class, classes in folders' order."""
    lines = [line.split("\t") for line in LOG.read_text().splitlines()[1:]]
    selection = Selection(
        DATASETS["imagenet"],
        layouts.Samples(50_000, lambda index: (Image.new("RGB", (1, 1)), str(index // 50))),
        {str(label): str(label) for label in range(1000)},
    )
    assert [int(line[0]) for line in lines] == list(selection.indices)
    assert [line[1] for line in lines] == [selection.label(index) for index in selection.indices]


def test_the_papers_preprocessing() -> None:
    """The shorter side becomes 256, antialiased; the center 224 x 224 are cut out."""
    columns: Any = np.tile(np.arange(512, dtype=np.uint8) // 2, (256, 1))
    found = np.asarray(preprocessed(Image.fromarray(columns)))
    assert found.shape == (224, 224)
    assert (found == columns[16:240, 144:368]).all()
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (1024, 512)))
    assert abs(np.asarray(preprocessed(stripes), dtype=int) - 127.5).max() <= 1


def test_imagenet_may_be_a_plain_folder(tmp_path: Path) -> None:
    """Folders of synsets, without `val` above them."""
    twin("imagenet", tmp_path, 8)
    assert select("imagenet", tmp_path / "val").samples.count == 8


@pytest.mark.parametrize("name", [name for name in DATASETS if DATASETS[name].files])
def test_a_missing_file_is_named_with_its_source(name: str, tmp_path: Path) -> None:
    """Its path, the data set, and the page that has it; nothing is made."""
    dataset = DATASETS[name]
    with pytest.raises(FileNotFoundError, match="there is no such file") as raised:
        select(name, tmp_path)
    first = tmp_path / dataset.folder / dataset.files[0]
    assert str(raised.value).startswith(f"{first}: ")
    assert f"{dataset.title} has it, see {dataset.source}" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_another_layout_is_refused(tmp_path: Path) -> None:
    """An unknown name, no classes, a torn file, two marked columns, labels for fewer images."""
    with pytest.raises(ValueError, match="dataset = 'mnist': must be one of imagenet, stl10, sun"):
        select("mnist", tmp_path)
    with pytest.raises(ValueError, match="needs a folder of images for each class"):
        select("imagenet", tmp_path)
    twin("cifar10", tmp_path, 8)
    with (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ValueError, match="holds no CIFAR-10 as published"):
        select("cifar10", tmp_path)
    twin("stl10", tmp_path, 8)
    (tmp_path / "stl10_binary" / "test_y.bin").write_bytes(b"\1" * 7)
    with pytest.raises(ValueError, match="there are 8 images and 7 labels"):
        select("stl10", tmp_path)
    twin("isic", tmp_path, 8)
    truth = next((tmp_path / "ISIC2018").rglob("*.csv"))
    truth.write_text(truth.read_text().replace("0.0,1.0", "1.0,1.0", 1))
    with pytest.raises(ValueError, match="holds no ISIC 2018 as published"):
        select("isic", tmp_path)


def test_an_unusable_image_is_named(tmp_path: Path) -> None:
    """One of a foreign class, one that is broken."""
    twin("eurosat", tmp_path, 8)
    folder = tmp_path / "eurosat" / "2750"
    (folder / "AnnualCrop").rename(folder / "Forrest")
    with pytest.raises(
        ValueError, match="image 0 of EuroSAT is of the class 'Forrest'; the classe"
    ):
        select("eurosat", tmp_path).label(0)
    (folder / "Forrest").rename(folder / "AnnualCrop")
    found = select("eurosat", tmp_path)
    assert found.label(0) == "annual crop land"
    (folder / "AnnualCrop" / "AnnualCrop_00000.jpg").write_bytes(b"\xff\xd8\xff broken")
    for read in (found.label, found.image):
        with pytest.raises(ValueError, match="image 0 of EuroSAT cannot be read: "):
            read(0)
