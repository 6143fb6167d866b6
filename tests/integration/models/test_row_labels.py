"""models/evaluation/row_labels.py: each row's label in order, kept in a file and read from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.denoisers.base import NoDenoiser
from models.evaluation.datasets.cifar10 import LabelledImages
from models.evaluation.row_labels import label_rows
from models.evaluation.tables import image_votes
from models.runtime import numerics_of
from models.smoothing import SmoothedModel

CPU = torch.device("cpu")


class Brightness:
    """Says `light` of images whose mean is above one half."""

    labels = ("dark", "light")

    def __call__(self, x: Tensor) -> Tensor:
        above = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-above, above], 1)


def model(digest: str = "digest") -> SmoothedModel:
    return SmoothedModel(
        NoDenoiser(), Brightness(), numerics_of(CPU, torch.float32, 50), CPU, digest
    )


@pytest.fixture
def data() -> LabelledImages:
    """Black, gray and white."""
    levels = np.array([0, 128, 255], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (3, 2, 2, 3)).copy()
    return LabelledImages(images, np.array([0, 1, 1]), ("dark", "light"))


def test_labels_are_those_of_the_votes(data: LabelledImages, tmp_path: Path) -> None:
    """Counted, they are the votes of `evaluate`; fewer rows are a prefix of more."""
    *_, many = label_rows(model(), data, 0.25, 130, tmp_path / "many.npz")
    *_, few = label_rows(model(), data, 0.25, 60, tmp_path / "few.npz")
    assert many.selection.shape == (3, 100)
    assert many.estimation.shape == (3, 130)
    assert (few.estimation == many.estimation[:, :60]).all()
    assert 0 < many.estimation[1].sum() < 130
    for index in range(3):
        votes = image_votes(model(), data, index, 0.25, 100, 130, seed=0)
        for labels, counted in zip((many.selection, many.estimation), votes, strict=True):
            assert np.bincount(labels[index], minlength=2).tolist() == counted.tolist()


def test_a_file_is_gone_on_from(
    data: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only images that the file lacks are labeled; an interrupted run keeps what it had."""
    path, labeled = tmp_path / "labels.npz", []
    real = SmoothedModel.labels

    def counting(self: SmoothedModel, parts: list) -> np.ndarray:
        labeled.append(parts[0].pixels.max())
        return real(self, parts)

    monkeypatch.setattr(SmoothedModel, "labels", counting)
    next(iter(label_rows(model(), data, 0.25, 50, path)))
    assert set(labeled) == {0}
    labeled.clear()
    *_, whole = label_rows(model(), data, 0.25, 50, path)
    assert set(labeled) == {128, 255}
    labeled.clear()
    *_, again = label_rows(model(), data[:2], 0.25, 20, path)
    assert not labeled
    assert (again.estimation == whole.estimation[:2, :20]).all()
    assert [file.name for file in tmp_path.iterdir()] == ["labels.npz"]


def test_another_question_s_file_is_refused(data: LabelledImages, tmp_path: Path) -> None:
    """Labels of another sigma, other networks or too few rows are no labels of these rows."""
    path = tmp_path / "labels.npz"
    list(label_rows(model(), data, 0.25, 50, path))
    for asked, sigma, rows, message in (
        (model(), 0.5, 50, "sigma = 0.25: must be 0.5"),
        (model("other"), 0.25, 50, "digest = digest: must be other"),
        (model(), 0.25, 51, "50 rows an image: must be 51"),
    ):
        with pytest.raises(ValueError, match=message):
            list(label_rows(asked, data, sigma, rows, path))
