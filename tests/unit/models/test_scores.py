"""models/evaluation/scores.py: figures over many certified images."""

from __future__ import annotations

from typing import Any

import pytest

from models.evaluation.scores import (
    average_certified_radius,
    certified_accuracy,
    wilson_interval,
)


def test_figures_count_only_correct_images() -> None:
    """A wrong or abstained image adds nothing, and a radius equal to epsilon counts."""
    radii, correct = [0.5, 1.0, 2.0, 0.0], [True, True, False, False]
    assert average_certified_radius(radii, correct) == pytest.approx(0.375)
    assert certified_accuracy(radii, correct, 0.0) == 0.5
    assert certified_accuracy(radii, correct, 0.5) == 0.5
    assert certified_accuracy(radii, correct, 0.5000001) == 0.25
    assert certified_accuracy(radii, correct, 1.5) == 0.0


@pytest.mark.parametrize(
    ("radii", "correct"),
    [
        ([], []),
        ([1.0], [True, False]),
        ([[1.0]], [[True]]),
        ([-0.1], [True]),
        ([float("nan")], [True]),
    ],
)
def test_figures_refuse_malformed_results(radii: Any, correct: Any) -> None:
    """No image, unequal lengths and impossible radii are ValueErrors, not quiet numbers."""
    with pytest.raises(ValueError, match=r"^radii"):
        average_certified_radius(radii, correct)
    with pytest.raises(ValueError, match=r"^radii"):
        certified_accuracy(radii, correct, 0.5)


def test_figures_refuse_an_impossible_epsilon() -> None:
    """A negative or infinite epsilon is a ValueError that names it."""
    for epsilon in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"^epsilon = "):
            certified_accuracy([1.0], [True], epsilon)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    successes: int, total: int, low: float, high: float
) -> None:
    """Newcombe (1998), method 3, for 81 of 263; the others from the formula's quadratic."""
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_impossible_shares_are_refused() -> None:
    """More successes than trials, and none at all."""
    for successes, total in ((11, 10), (-1, 10), (0, 0)):
        with pytest.raises(ValueError, match=f"{successes} successes of {total}"):
            wilson_interval(successes, total)
