"""Evaluation: the protocol's figures, its logs, and the data it reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.certificates.rules import certify
from models.denoisers.base import NoDenoiser
from models.evaluation.datasets.cifar10 import SLICE, LabelledImages, cifar10, evaluation_slice
from models.evaluation.scores import paired_bootstrap
from models.evaluation.tables import (
    accuracy,
    certify_images,
    recognised,
    summarise,
)
from models.noise import total_variation
from models.runtime import numerics_of
from models.smoothing import SmoothedModel

CPU = torch.device("cpu")


class Brightness:
    """Says `light` of images whose mean is above one half."""

    labels = ("dark", "light")

    def __call__(self, x: Tensor) -> Tensor:
        above = x.mean((1, 2, 3)) - 0.5
        return torch.stack([-above, above], 1)


@pytest.fixture
def model() -> SmoothedModel:
    return SmoothedModel(NoDenoiser(), Brightness(), numerics_of(CPU, torch.float32, 50), CPU)


@pytest.fixture
def data() -> LabelledImages:
    """Black called dark, white called light, white called dark, and grey, which is neither."""
    levels = np.array([0, 255, 255, 128], np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (4, 2, 2, 3)).copy()
    return LabelledImages(images, np.array([0, 1, 0, 1]), ("dark", "light"))


def test_outcomes_and_summary(model: SmoothedModel, data: LabelledImages) -> None:
    """A wrong label and an abstention are certified nowhere; the rest at their radius."""
    outcomes = list(certify_images(model, data, 0.25, 20, 50, 0.001, seed=0))
    assert [o.correct for o in outcomes] == [True, True, False, False]
    assert outcomes[3].certificate.abstained
    blur = total_variation(0.25, (3, 2, 2))
    best = certify([0, 20], [0, 50], 0.25, 0.001, method="cohen", total_variation=blur)
    assert outcomes[0].radius == best.radius
    summary = summarise(outcomes)
    assert summary.images == 4
    assert summary.certified[0.0] == 0.5
    assert summary.certified[1.0] == 0.0
    assert summary.average_certified_radius == pytest.approx(outcomes[0].radius / 2)
    both = certify([0, 20], [0, 50], 0.25, 0.001, total_variation=blur)
    assert (outcomes[0].two_sided.radius, outcomes[0].two_sided.method) == (
        both.radius,
        "two-sided",
    )
    assert summary.certified_two_sided[0.0] == 0.5
    assert summary.average_certified_radius_two_sided == pytest.approx((both.radius or 0.0) / 2)
    assert summary.row_accuracy == pytest.approx(np.mean([1, 1, 0, outcomes[3].row_accuracy]))


def test_a_run_can_be_repeated_to_the_row(model: SmoothedModel, data: LabelledImages) -> None:
    """The same seed gives the same counts, another seed others."""
    runs = [
        [o.certificate.counts for o in certify_images(model, data, 0.25, 20, 50, 0.001, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_accuracy_and_recognition(data: LabelledImages) -> None:
    """The bare classifier's accuracy, and the share of made images that it names."""
    assert accuracy(Brightness(), data, CPU, batch_rows=3) == 0.75

    def generate(label: int) -> np.ndarray:
        return np.stack([np.full((2, 2, 3), 255 * label, np.uint8), np.zeros((2, 2, 3), np.uint8)])

    assert recognised(Brightness(), generate, CPU, each=2, batch_rows=3) == 0.75


def test_slice_is_every_twentieth_test_image() -> None:
    """The shipped slice holds 500 images with their labels; the first are those of CIFAR-10."""
    data = evaluation_slice(SLICE)
    assert len(data) == 500
    assert data.images.shape == (500, 32, 32, 3)
    assert data.names[data.labels[4]] == "ship"
    assert np.bincount(data.labels, minlength=10).min() >= 35


def test_cifar10_reads_the_sheets(tmp_path: Path) -> None:
    """Sheets of one image a row become images in the splits' order."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50_000, 1, 1), np.uint8)
    for number in range(5):
        part = np.broadcast_to(images[number * 10_000 :][:10_000], (10_000, 1024, 3))
        Image.fromarray(np.ascontiguousarray(part)).save(
            tmp_path / f"data_batch_{number + 1}.png", compress_level=1
        )
    (tmp_path / "train_lables.json").write_text(json.dumps([i % 10 for i in range(50_000)]))
    train, held_back = cifar10(tmp_path, "train"), cifar10(tmp_path, "held-back")
    assert (len(train), len(held_back)) == (48_000, 2_000)
    assert held_back.images[7, 3, 5, 1] == images[48_007, 0, 0]
    assert held_back.labels[7] == 7
    with pytest.raises(ValueError, match="split must be train, held-back or test"):
        cifar10(tmp_path, "validation")


def test_only_some_labels_are_kept_in_their_own_order() -> None:
    """Labels become indices into the names asked for, whatever their order; images go along."""
    images = np.arange(6 * 12, dtype=np.uint8).reshape(6, 2, 2, 3)
    whole = LabelledImages(images, np.array([0, 1, 2, 2, 1, 0]), ("cat", "dog", "ship"))
    kept = whole.only(("ship", "cat"))
    assert kept.names == ("ship", "cat")
    assert kept.labels.tolist() == [1, 0, 0, 1]
    assert np.array_equal(kept.images, images[[0, 2, 3, 5]])
    with pytest.raises(ValueError, match="no images of 'frog'; there are cat, dog, ship"):
        whole.only(("frog", "cat"))


def test_a_paired_bootstrap_covers_the_true_difference() -> None:
    """Of many pairs whose figures share most of their scatter, about 95 % of the intervals hold the
    true difference, and they are as narrow as pairing makes them."""
    generator, held, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        shared = generator.normal(0, 10, 100)
        before = shared + generator.normal(0, 1, 100)
        after = shared + 0.5 + generator.normal(0, 1, 100)
        _, low, high = paired_bootstrap(before, after, draws=400, seed=trial)
        held += low <= 0.5 <= high
        widths.append(high - low)
    assert 176 <= held <= 199
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2**0.5 / 10, rel=0.1)
    with pytest.raises(ValueError, match="2 images before and 3 after"):
        paired_bootstrap(np.zeros(2), np.zeros(3))
