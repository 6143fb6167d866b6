"""What adaptation gives, measured: variants that share rows, and votes that are kept."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import adaptation_ablations as ablations
from benchmarks import finetuning
from benchmarks.adaptation import Together, adapted, apart, certified, compared, radii
from models.adaptation import references
from models.adaptation.plan import Plan
from models.adaptation.profiles import ADAPTATIONS
from models.denoisers.base import NoDenoiser
from models.evaluation.datasets.cifar10 import LabelledImages
from models.evaluation.tables import certify_images
from models.runtime import computes_bfloat16, numerics_of
from models.smoothing import SmoothedModel
from models.zoo.registry import DENOISER_SETS

CPU = torch.device("cpu")


class Brighter:
    """Says `light` of rows whose mean is above a threshold."""

    labels = ("dark", "light")

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def __call__(self, x: Tensor) -> Tensor:
        above = x.mean((1, 2, 3)) - self._threshold
        return torch.stack([-above, above], 1)


HEADS = Brighter(0.5), Brighter(0.55)
DATA = LabelledImages(
    np.broadcast_to(np.array([110, 128, 160], np.uint8)[:, None, None, None], (3, 2, 2, 3)).copy(),
    np.array([0, 0, 1]),
    HEADS[0].labels,
)
ASKED = argparse.Namespace(n0=20, n=60, alpha=0.01, seed=3, data=None, count=None)
NAMES = DATA.names


def smoothed(classifier: Brighter | Together) -> SmoothedModel:
    numerics = numerics_of(CPU, torch.float32, 16)
    return SmoothedModel(NoDenoiser(), classifier, numerics, CPU, digest="abc")


def test_together_they_say_what_each_says_alone(tmp_path: Path) -> None:
    """Sharing rows changes no vote of any of them."""
    both = certified(ASKED, smoothed(Together(HEADS)), ["one", "two"], DATA, NAMES, 0.25, tmp_path)
    for head, found in zip(HEADS, both.values(), strict=True):
        assert found == list(certify_images(smoothed(head), DATA, 0.25, 20, 60, 0.01, seed=3))
    assert both["one"] != both["two"]
    changed, base = compared(both["one"], both["two"]), radii(both["one"]).mean()
    by, low, high = changed["average certified radius"]
    assert by == pytest.approx(radii(both["two"]).mean() - base, abs=1e-4)
    assert low <= by <= high
    assert changed["ACR, relative"] == pytest.approx([by / base, low / base, high / base], abs=2e-3)


def test_logits_that_are_not_finite_are_refused() -> None:
    """Joined labels must not hide what one classifier could not compute."""
    with pytest.raises(FloatingPointError, match="not finite"):
        list(
            certify_images(
                smoothed(Together([HEADS[0], Brighter(float("nan"))])), DATA, 0.25, 5, 5, 0.01, 0
            )
        )


def test_votes_come_apart_by_classifier() -> None:
    """The first classifier's label counts most in a joint one."""
    assert apart(np.array([1, 2, 3, 4]), 2, 2) == [[3, 7], [4, 6]]
    assert apart(np.array([5, 6]), 2, 1) == [[5, 6]]


def test_kept_votes_are_not_counted_again(tmp_path: Path) -> None:
    """A run that was cut within a line goes on from the last whole one, to the same outcomes."""
    whole = certified(ASKED, smoothed(HEADS[0]), ["one"], DATA, NAMES, 0.25, tmp_path)
    (kept,) = tmp_path.glob("votes-*.jsonl")
    written = kept.read_text()
    kept.write_text(written[: written.index("\n") + 5])
    assert certified(ASKED, smoothed(HEADS[0]), ["one"], DATA, NAMES, 0.25, tmp_path) == whole
    assert kept.read_text() == written
    assert certified(ASKED, smoothed(HEADS[1]), ["one"], DATA, NAMES, 0.25, tmp_path) == whole


def test_noise_follows_an_image_into_every_task(tmp_path: Path) -> None:
    """Where others lie before them, images of a task have the noise of their places among all."""
    images = np.concatenate([DATA.images[:1], DATA.images])
    among = LabelledImages(images, np.array([2, 0, 0, 1]), (*NAMES, "other"))
    found = certified(ASKED, smoothed(HEADS[0]), ["one"], among, NAMES, 0.25, tmp_path)["one"]
    alike = LabelledImages(images, np.array([0, 0, 0, 1]), NAMES)
    every = list(certify_images(smoothed(HEADS[0]), alike, 0.25, 20, 60, 0.01, seed=3))
    assert [one.certificate for one in found] == [one.certificate for one in every[1:]]
    assert [one.truth for one in found] == [0, 0, 1]


def test_a_kept_bundle_is_of_the_profile_and_precision_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same plan and profile find what is kept; under another profile, or where the CPU computes
    best in something else, the plan is adapted anew, beside it."""
    monkeypatch.setattr(references, "EVALUATED_ROWS", 4)
    plan = Plan.checked(["cat", "ship"], shots=1, steps=0, epochs=0)
    first, _ = adapted(plan, tmp_path)
    assert adapted(plan, tmp_path)[0].folder == first.folder
    nano = ADAPTATIONS["nano"]
    other = replace(nano, finetuning=replace(nano.finetuning, mixing=0.9))
    monkeypatch.setitem(ADAPTATIONS, "nano", other)
    second, _ = adapted(plan, tmp_path)
    assert second.folder != first.folder
    able = computes_bfloat16()
    monkeypatch.setattr("models.smoothing.computes_bfloat16", lambda: not able)
    third, _ = adapted(plan, tmp_path)
    assert third.folder not in (first.folder, second.folder)
    kinds = ["bfloat16", "float32"] if able else ["float32", "bfloat16"]
    assert [
        (each.adaptation["profile"], each.adaptation["dtype"]) for each in (first, second, third)
    ] == [
        (nano.described(), kinds[0]),
        (other.described(), kinds[0]),
        (other.described(), kinds[1]),
    ]


def test_ablations_count_rows_under_the_same_noise() -> None:
    """An image's share is what its rows are named, and asking again gives the same."""
    rows = [
        ablations.rows_named_right(NoDenoiser(), head, DATA, 0.25) for head in (*HEADS, HEADS[0])
    ]
    assert set(np.concatenate(rows)) <= {0.0, 0.5, 1.0}
    assert rows[0][0] >= rows[0][1]
    assert rows[0][2] == 1.0
    assert (rows[0] == rows[2]).all()
    assert (rows[0] != rows[1]).any()


def test_ablations_choose_the_first_references_of_each_label() -> None:
    """Label after label, and all of one that has fewer."""
    labels = np.array([1, 0, 1, 1, 0])
    assert ablations.first_of_each(labels, 2).tolist() == [1, 4, 0, 2]
    assert ablations.first_of_each(labels, 3).tolist() == [1, 4, 0, 2, 3]


def test_ablations_are_told_as_differences_to_the_first() -> None:
    """In points, with the ends of the interval."""
    base, better = np.array([0.0, 1.0] * 50), np.ones(100)
    lines: list[str] = []
    found = {"nothing": dict.fromkeys(ablations.SIGMAS, base), "all": {0.25: better, 0.5: base}}
    ablations.table(found, lines.append)
    assert lines[2].endswith("| 50.0 % | +0.0 (+0.0 to +0.0) | 50.0 % | +0.0 (+0.0 to +0.0) |")
    assert lines[3].startswith("| all | 100.0 % | +50.0 (+4")
    assert len({way.label for way in ablations.EVERY}) == len(ablations.EVERY)


def test_classifiers_are_compared_on_the_same_rows() -> None:
    """Shares of an image's noisy rows that each names right; the same again."""
    rows = finetuning.denoised(NoDenoiser(), DATA, 0.25, 200)
    assert torch.equal(rows, finetuning.denoised(NoDenoiser(), DATA, 0.25, 200))
    assert rows[1].float().mean() == pytest.approx(128 / 255, abs=0.02)
    one, two = (finetuning.shares_of(head, rows, DATA.labels) for head in HEADS)
    assert one[0] == pytest.approx(1.0, abs=0.25)
    assert two[1] > one[1]
    assert two[2] < one[2]


def test_radii_are_estimated_from_shares() -> None:
    """Sigma times the quantile, none below a majority, and finite where every row is right."""
    found = finetuning.radii(np.array([0.3, 0.5, 0.8413447460685429, 1.0]), 0.5, 60)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.5 * 2.394], abs=1e-3)


def test_ways_of_fine_tuning_are_told_apart() -> None:
    """No two lines of the table have one name, each says what it gains, and the last is nano's."""
    told = [way.label for way in finetuning.EVERY]
    assert len(set(told)) == len(told)
    chosen, ways, of_set = finetuning.EVERY[-1], ADAPTATIONS["nano"], DENOISER_SETS["nano"]
    assert (chosen.each, chosen.epochs) == (of_set.shots, of_set.epochs)
    assert chosen.rate == ways.finetuning.profile.learning_rate
    assert (chosen.soft_targets, chosen.mixing) == (True, ways.finetuning.mixing)
    assert ways.finetuning.soft_targets
    base, radius = np.array([0.0, 0.4] * 50), np.array([0.0, 0.42] * 50)
    line = finetuning.row("all", np.array([0.4, 0.8] * 50), base, radius)
    assert line.startswith("| all | 60.0 % | 50.0 % | 0.210 | +5.0 % (+4.")
    assert line.endswith(") |")
    assert 5.0 < float(line.split(" to +")[1].split(")")[0]) < 7.0
