"""models/evaluation/logs/printed_radii.py: every count comes back, or is among some."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from math import floor

import pytest

from models.evaluation.logs.printed_radii import invert
from tests.support.logs import radius_of

N, SIGMA, ALPHA = 1000, 0.25, 0.001


@pytest.mark.parametrize("print_radius", [
    lambda radius: f"{radius:.3}",
    lambda radius: f"{radius:.3f}",
    lambda radius: f"{floor(radius * 1e6) / 1e6:.6f}",
    lambda radius: f"{radius:.12f}",
])  # fmt: skip
def test_each_count_is_among_those_of_its_print(print_radius: Callable[[float], str]) -> None:
    """Whatever the digits and the rounding are, and with one count alone where prints differ."""
    votes = range(560, N + 1)
    printed = [print_radius(radius_of(k, N, SIGMA)) for k in votes]
    found = invert([Decimal(text) for text in printed], N, SIGMA, ALPHA)
    for k, text, least, most in zip(votes, printed, found.least, found.most, strict=True):
        assert least <= k <= most
        alike = [other for other in votes if printed[other - 560] == text]
        assert [least, most] == [alike[0], alike[-1]]
    assert found.inconsistent == 0
    assert found.full == printed.count(printed[-1])
    assert found.largest == pytest.approx(float(printed[-1]))
    once = [k for k in votes if printed.count(printed[k - 560]) == 1 and 560 < k < N]
    assert found.readable[found.readable < N - 560].tolist() == [N - k for k in reversed(once)]


def test_a_radius_between_two_counts_has_none() -> None:
    """It is inconsistent, and the others are still inverted."""
    between = (radius_of(999, N, SIGMA) + radius_of(1000, N, SIGMA)) / 2
    radii = [Decimal(f"{r:.6f}") for r in (between, radius_of(990, N, SIGMA))]
    found = invert(radii, N, SIGMA, ALPHA)
    assert found.least.tolist() == [0, 990]
    assert (found.inconsistent, found.ambiguous) == (1, 0)


def test_a_coarse_print_is_ambiguous() -> None:
    """One digit fits many counts, and no missing vote can be read."""
    found = invert([Decimal("0.3"), Decimal("0.4")], N, SIGMA, ALPHA)
    assert found.ambiguous == 2
    assert not len(found.readable[found.readable < 100])
