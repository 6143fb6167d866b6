"""Published certification logs, repeated from their votes."""

from __future__ import annotations

import csv
import functools

import pytest
from scipy.stats import binom, norm

from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import certified_radius
from models.evaluation.scores import average_certified_radius, certified_accuracy
from tests.support.paths import SHARED

# --- Published logs ------------------------------------------------------------------------------


ORACLES = SHARED / "oracles"


def read_log(name: str) -> list[dict[str, str]]:
    path = ORACLES / f"{name}.tsv"
    if not path.exists():
        pytest.skip(f"the certification log {path} is not here")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@functools.cache
def radius_of(k: int, n: int, sigma: float) -> float:
    return certified_radius(clopper_pearson_lower(k, n, 0.001), sigma)


def votes_behind(printed: float, n: int, sigma: float) -> list[int]:
    """The k near the one expected whose radius prints, to three digits, as the log's does."""
    guess = int(binom.isf(0.001, n, norm.cdf(printed / sigma)))
    nearby = range(max(0, guess - 2), min(n, guess + 3) + 1)
    return [k for k in nearby if float(f"{radius_of(k, n, sigma):.3g}") == printed]


CIFAR = "cifar10_cohen_resnet110_certified_sigma_"
IMAGENET = "imagenet_paper_certified_sigma_"


@pytest.mark.parametrize(
    ("name", "n", "sigma"),
    [
        (CIFAR + "0.25", 100_000, 0.25),
        (CIFAR + "0.50", 100_000, 0.5),
        (IMAGENET + "0.25", 10_000, 0.25),
        (IMAGENET + "0.50", 10_000, 0.5),
    ],
)
def test_every_published_radius_comes_from_whole_votes(name: str, n: int, sigma: float) -> None:
    """Each printed radius is what CERTIFY gives for some integer count at alpha = 0.001."""
    printed = {float(row["radius"]) for row in read_log(name) if row["predict"] != "-1"}
    assert len(printed) > 200
    assert [radius for radius in printed if not votes_behind(radius, n, sigma)] == []


@pytest.mark.parametrize(
    ("name", "percent", "radius"),
    [
        (CIFAR + "0.25", (76.6, 61.2, 42.2, 25.1), 0.424),
        (CIFAR + "0.50", (65.7, 54.9, 42.8, 32.5, 22.0), 0.525),
        (IMAGENET + "0.25", (53.4, 44.8, 34.2, 21.6), 0.303),
        (IMAGENET + "0.50", (46.0, 38.8, 32.4, 25.0, 20.6), 0.409),
    ],
)
def test_the_published_figures_come_back(
    name: str, percent: tuple[float, ...], radius: float
) -> None:
    """Certified accuracy and average radius of the logs are the anchors of method.md section 6."""
    rows = read_log(name)
    radii = [float(row["radius"]) for row in rows]
    correct = [row["correct"] == "1" for row in rows]
    for epsilon, expected in zip((0.0, 0.25, 0.5, 0.75, 1.0), percent, strict=False):
        got = 100 * certified_accuracy(radii, correct, epsilon)
        assert got == pytest.approx(expected, abs=0.0501)
    assert average_certified_radius(radii, correct) == pytest.approx(radius, abs=0.0005)


@pytest.mark.parametrize(("sigma", "fours", "rows"), [(0.25, 31, 35), (0.5, 23, 24)])
def test_the_published_imagenet_noise_was_reused(sigma: float, fours: int, rows: int) -> None:
    """Almost every count in 9980..9999 is a multiple of 4, none above 9996 (method.md 2)."""
    log = read_log(f"{IMAGENET}{sigma:.2f}")
    counts = []
    for row in log:
        behind = votes_behind(float(row["radius"]), 10_000, sigma) if row["predict"] != "-1" else []
        if behind and 9980 <= behind[0] < 10_000:
            assert len(behind) == 1
            counts.append(behind[0])
    assert len(counts) == rows
    assert sum(count % 4 == 0 for count in counts) == fours
    assert max(counts) <= 9996


def test_a_quarter_of_the_rows_could_not_certify_the_published_radii() -> None:
    """With the effective n of 2,500 no radius reaches 0.75 at sigma 0.25 (method.md section 2)."""
    assert radius_of(2500, 2500, 0.25) < 0.75 < radius_of(10_000, 10_000, 0.25)
