"""models/certificates/alpha.py: equal shares of a family's alpha."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.certificates.alpha import family_share


@given(st.floats(1e-300, 0.5, exclude_max=True), st.integers(1, 100_000))
def test_shares_sum_to_at_most_alpha(alpha: float, m: int) -> None:
    """m exact shares never exceed alpha, and m of the next float do."""
    share = family_share(alpha, m)
    assert m * Fraction(share) <= Fraction(alpha)
    assert m * Fraction(math.nextafter(share, 1.0)) > Fraction(alpha)


def test_rounding_to_nearest_would_be_too_much() -> None:
    """Five of the float nearest to a fifth of 0.001 are more than 0.001."""
    assert 5 * Fraction(0.001 / 5) > Fraction(0.001)
    assert family_share(0.001, 5) < 0.001 / 5
    assert family_share(0.001, 1) == 0.001


@pytest.mark.parametrize(
    ("alpha", "m", "reason"),
    [
        (0.0, 3, "family alpha = 0.0: must be above 0 and below 0.5"),
        (0.5, 3, "family alpha = 0.5: must be above 0 and below 0.5"),
        (math.nan, 3, "family alpha = nan: must be above 0 and below 0.5"),
        (0.1, 0, "m = 0: must be at least 1"),
    ],
)
def test_what_is_no_family_is_named(alpha: float, m: int, reason: str) -> None:
    """An alpha outside its limits, and a family of nothing."""
    with pytest.raises(ValueError, match=f"^{reason}$"):
        family_share(alpha, m)
