"""service/cli/evaluation/images.py: folders, tables and sheets of labeled images."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice
from service.cli.evaluation.images import dataset_images, digest, read_images
from service.predictions.images.reader import decode
from tests.support.datasets import twin
from tests.support.serving import PNG

LABELS = ("cat", "dog", "garden spider")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat/b.png", "cat/a.png", "Garden_Spider/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "cat" / "notes.txt").write_text("none")
    return tmp_path


def test_a_folder_has_a_sub_folder_for_each_label(folder: Path) -> None:
    """Sorted, other files left out; case, underscores and hyphens of a name do not count."""
    files = read_images(folder).chosen([LABELS], None)
    assert [(file.index, file.name, file.label) for file in files] == [
        (0, "Garden_Spider/c.png", "garden spider"),
        (1, "cat/a.png", "cat"),
        (2, "cat/b.png", "cat"),
    ]
    assert files[1].read() == PNG


@pytest.mark.parametrize(
    "text",
    [
        "path,label\ncat/a.png,cat\nGarden_Spider/c.png,garden spider\n",
        "author,Label,Path\nann,cat,cat/a.png\nbob,garden spider,Garden_Spider/c.png\n",
        "\ufeffcat/a.png,cat\n\nGarden_Spider/c.png,garden spider\n",
    ],
)
def test_a_table_has_paths_and_labels(folder: Path, text: str) -> None:
    """By the columns' names, or the first two; paths are relative to the table's folder."""
    (folder / "images.csv").write_text(text)
    files = read_images(folder / "images.csv").chosen([LABELS], None)
    assert [(file.name, file.label) for file in files] == [
        ("cat/a.png", "cat"),
        ("Garden_Spider/c.png", "garden spider"),
    ]


def test_the_slice_serves_every_task_of_its_labels() -> None:
    """Images keep their places and pixels; those of other labels are left out; a limit spreads."""
    data = evaluation_slice(SLICE)
    files = read_images(None).chosen([("ship", "frog", "unicorn")], None)
    assert {file.label for file in files} == {"ship", "frog"}
    assert [data.names[data.labels[file.index]] for file in files] == [f.label for f in files]
    assert (decode(files[3].read(), 32) == data.images[files[3].index].transpose(2, 0, 1)).all()
    ten = read_images(None).chosen([data.names], 10)
    assert [file.index for file in ten] == list(range(0, 500, 50))


def test_several_tasks_share_the_images_of_common_labels(folder: Path) -> None:
    """An image whose label one of them lacks is refused in a folder."""
    files = read_images(None).chosen([("ship", "frog"), ("cat", "ship")], None)
    assert {file.label for file in files} == {"ship"}
    with pytest.raises(ValueError, match=r"Garden_Spider/c\.png: 'Garden_Spider' is no label"):
        read_images(folder).chosen([LABELS, ("cat", "dog")], None)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (("car", "garden spiders"), "did you mean 'garden spiders'"),
        (("x", "y"), "'Garden_Spider' is no label of the task; the labels are x, y"),
    ],
)
def test_an_unknown_label_is_named_with_the_nearest(
    folder: Path, labels: tuple[str, ...], reason: str
) -> None:
    """The message has the file, its label and the nearest one, or the labels."""
    with pytest.raises(ValueError, match=reason):
        read_images(folder).chosen([labels], None)


def test_what_is_no_set_of_images_is_refused(tmp_path: Path) -> None:
    """An empty folder, an empty table, a half line, another file, a missing one."""
    with pytest.raises(ValueError, match="has no sub-folder"):
        read_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(OSError, match="holds no file that ends in"):
        read_images(tmp_path)
    table = tmp_path / "images.csv"
    for text, reason in (("path,label\n", "has no line"), ("a.png\n", "'a.png' has no path")):
        table.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_images(table)
    table.write_text("path,label\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"images\.csv: is no CSV in UTF-8"):
        read_images(table)
    table.write_text("gone.png,cat\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_images(table)
    (tmp_path / "a.jpg").write_bytes(PNG)
    with pytest.raises(ValueError, match="must be a folder with a sub-folder"):
        read_images(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="the shipped slice: no image shows one of lion, tiger"):
        read_images(None).chosen([("lion", "tiger")], None)


def test_a_data_sets_labels_must_all_be_the_tasks(tmp_path: Path) -> None:
    """The selected images at the paper's resolution; a task may have more labels, none less."""
    twin("eurosat", tmp_path, 1004)
    found = dataset_images("eurosat", tmp_path)
    assert (found.source, found.total, len(found.files)) == ("EuroSAT", 1004, 502)
    assert len(found.labels) == 10
    files = found.chosen([[*found.labels, "desert"]], 2)
    assert [(file.index, file.label) for file in files] == [
        (0, "annual crop land"),
        (502, "industrial buildings or commercial buildings"),
    ]
    assert decode(files[0].read(), 224).shape == (3, 224, 224)
    with pytest.raises(ValueError, match="EuroSAT: 'lake or sea' is no label of the task; the lab"):
        found.chosen([found.labels[:-1]], None)


def test_a_data_set_without_torchvision_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client without it reads the data sets that need no torchvision, and names the package."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    twin("eurosat", tmp_path, 8)
    with pytest.raises(ValueError, match=r"'eurosat' cannot be read .*: pip install '\.\["):
        dataset_images("eurosat", tmp_path)
    twin("cifar10", tmp_path, 8)
    assert len(dataset_images("cifar10", tmp_path).files) == 8


def test_the_digest_follows_contents_and_labels(folder: Path) -> None:
    """A changed picture is another set of images."""
    before = digest(read_images(folder).files)
    assert digest(read_images(folder).files) == before
    (folder / "cat" / "a.png").write_bytes(PNG + b" ")
    assert digest(read_images(folder).files) != before
