"""certificates/bounds.py against exact vectors: the safe side of each rounding, and how close."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from scipy.stats import beta

from models.certificates.bounds import (
    anytime_lower,
    anytime_upper,
    clopper_pearson_lower,
    clopper_pearson_upper,
    log_e,
    lowered,
    quantile_down,
    quantile_up,
    raised,
)
from tests.support.paths import DATA

CLOPPER_PEARSON = json.loads((DATA / "certificates/vectors.json").read_text())["certify"]
E_PROCESS = json.loads((DATA / "certificates/e_process.json").read_text())
TOLERANCE = Decimal("1e-10")
# A busy machine must not fail a property for taking its time.
UNHURRIED = settings(deadline=None)


@st.composite
def tallies(draw: st.DrawFn) -> tuple[int, int]:
    n = draw(st.integers(1, 100_000))
    return draw(st.integers(0, n) | st.integers(0, min(n, 20))), n


# --- Clopper and Pearson -------------------------------------------------------------------------


def test_clopper_pearson_is_on_the_safe_side_of_exact() -> None:
    """Lower bounds lie in (exact - 1e-10, exact], upper ones in [exact, exact + 1e-10)."""
    for vector in CLOPPER_PEARSON:
        k, n, alpha, exact = vector["k"], vector["n"], vector["alpha"], Decimal(vector["bound"])
        lower = Decimal(clopper_pearson_lower(k, n, alpha))
        upper = Decimal(clopper_pearson_upper(n - k, n, alpha))
        assert 0 <= exact - lower < TOLERANCE, vector
        assert 0 <= upper - (1 - exact) < TOLERANCE, vector


def test_an_upper_bound_near_zero_keeps_its_digits() -> None:
    """A small upper bound is accurate to its own size, which 1 - lower would not be."""
    for k in (0, 1, 5):
        exact = beta.isf(1e-9, k + 1, 100_000 - k)
        assert clopper_pearson_upper(k, 100_000, 1e-9) == pytest.approx(exact, rel=1e-9)


def test_the_ends_of_clopper_pearson() -> None:
    """No success proves 0 from below, n successes 1 from above."""
    assert clopper_pearson_lower(0, 50, 0.01) == 0.0
    assert clopper_pearson_upper(50, 50, 0.01) == 1.0
    assert clopper_pearson_upper(0, 1, 0.5) == pytest.approx(0.5)


@UNHURRIED
@given(tallies(), st.floats(1e-100, 0.5))
def test_the_two_sides_enclose_the_share_seen(pair: tuple[int, int], alpha: float) -> None:
    """Lower and upper bounds at a level of at most 1/2 lie on both sides of k/n, within [0, 1]."""
    k, n = pair
    assert 0.0 <= clopper_pearson_lower(k, n, alpha) <= k / n
    assert k / n <= clopper_pearson_upper(k, n, alpha) <= 1.0


# --- The e-process -------------------------------------------------------------------------------


def test_the_margin_of_log_e_is_ten_times_its_largest_error() -> None:
    """Every value lies below the exact one, by 1e-13 (n + 10) give or take a tenth of it.

    Or it is -inf, for votes so far below p0 that E is below 1.
    """
    assert len(E_PROCESS["log_e"]) > 500
    for vector in E_PROCESS["log_e"]:
        k, n, p0 = vector["k"], vector["n"], vector["p0"]
        found = log_e(k, n, p0)
        if found == -math.inf:
            assert Decimal(vector["log_e"]) < 0, vector
            continue
        gap = float(Decimal(vector["log_e"]) - Decimal(found)) / (1e-13 * (n + 10))
        assert 0.9 < gap < 1.1, vector


def test_anytime_bounds_are_on_the_safe_side_of_exact() -> None:
    """Lower bounds lie in (exact - 1e-10, exact], the mirrored upper ones above 1 - exact."""
    assert len(E_PROCESS["bounds"]) > 200
    for vector in E_PROCESS["bounds"]:
        k, n, level, exact = vector["k"], vector["n"], vector["level"], Decimal(vector["bound"])
        lower = Decimal(anytime_lower(k, n, level))
        upper = Decimal(anytime_upper(n - k, n, level))
        assert 0 <= exact - lower < TOLERANCE, vector
        assert 0 <= upper - (1 - exact) < TOLERANCE, vector


def test_the_ends_of_the_anytime_bounds() -> None:
    """No success proves 0 from below, n successes 1 from above."""
    assert anytime_lower(0, 50, 0.01) == 0.0
    assert anytime_upper(50, 50, 0.01) == 1.0


@pytest.mark.parametrize("k", [1, 3, 30, 99, 100])
def test_the_e_process_crosses_a_level_once(k: int) -> None:
    """E falls in p0 wherever it is at least 2, so that the bound is an infimum."""
    points = np.union1d(np.geomspace(1e-12, 0.1, 300), np.linspace(0.1, 0.9999, 2000))
    values = np.array([log_e(k, 100, float(p0)) for p0 in points])
    falls = values[1:] < values[:-1]
    assert falls[values[:-1] >= math.log(2.0)].all()
    assert (values[points >= k / 100] < math.log(2.0)).all()


@UNHURRIED
@given(tallies(), st.floats(1e-100, 0.25))
def test_the_anytime_bound_pays_for_all_looks(pair: tuple[int, int], level: float) -> None:
    """It lies below the bound of one look, grows with k and with the level, and stays in [0, 1)."""
    k, n = pair
    bound = anytime_lower(k, n, level)
    assert 0.0 <= bound < 1.0
    # The other bound is rounded down by up to 2e-12.
    assert bound <= clopper_pearson_lower(k, n, level) + 2e-12
    assert bound <= anytime_lower(min(k + 1, n), n, level)
    assert bound <= anytime_lower(k, n, 2.0 * level)


def test_the_e_process_is_a_fair_bet() -> None:
    """At p = p0 the mean of E over a row is E again, within its margin: a martingale."""
    for k, n, p0 in ((0, 1, 0.3), (3, 7, 0.5), (40, 60, 0.8), (900, 1000, 0.9)):
        now, hit, miss = (
            math.exp(log_e(*tally, p0)) for tally in ((k, n), (k + 1, n + 1), (k, n + 1))
        )
        assert p0 * hit + (1.0 - p0) * miss == pytest.approx(now, rel=1e-9)


def test_too_many_rows_are_refused() -> None:
    """Where the rounding error was not measured nothing is stated."""
    with pytest.raises(ValueError, match=r"^n = 100001: the largest n of an e-process is 100000$"):
        anytime_lower(5, 100_001, 0.01)


@pytest.mark.parametrize("bound", [clopper_pearson_upper, anytime_lower, anytime_upper])
def test_impossible_tallies_and_levels_are_refused(bound: object) -> None:
    """A tally that cannot be, and a level out of range, are ValueErrors that name it."""
    assert callable(bound)
    for k, n in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(ValueError, match=r"^k = "):
            bound(k, n, 0.01)
    for level in (0.0, 9e-101, 0.6, math.nan):
        with pytest.raises(ValueError, match=r"^alpha = "):
            bound(5, 10, level)


# --- Quantiles and total variation ---------------------------------------------------------------


@pytest.mark.parametrize("p", [1e-100, 1e-9, 0.02, 0.3, 0.4999999, 0.5, 0.5000001, 0.8, 1 - 1e-15])
def test_quantiles_enclose_the_exact_one(p: float) -> None:
    """Phi of the two roundings lies on both sides of p in 50 digits; they are 4e-12 apart."""
    down, up = quantile_down(p), quantile_up(p)
    with mp.workdps(50):
        assert mp.ncdf(down) <= p <= mp.ncdf(up)
    assert 0.0 <= up - down <= 4e-12 * abs(up)


def test_quantiles_of_certainty_are_infinite() -> None:
    """0 and 1 have infinite quantiles, not NaN."""
    assert (quantile_down(0.0), quantile_up(0.0)) == (-math.inf, -math.inf)
    assert (quantile_down(1.0), quantile_up(1.0)) == (math.inf, math.inf)


@given(st.floats(0.0, 1.0), st.floats(1e-15, 0.49))
def test_total_variation_moves_bounds_outwards(p: float, distance: float) -> None:
    """Lower bounds fall by at least the distance down to 0, upper ones rise up to 1."""
    assert Decimal(lowered(p, distance)) <= max(Decimal(0), Decimal(p) - Decimal(distance))
    assert Decimal(raised(p, distance)) >= min(Decimal(1), Decimal(p) + Decimal(distance))
    assert (lowered(p, 0.0), raised(p, 0.0)) == (p, p)
