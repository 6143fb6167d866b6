"""The two-sided rule of models/certificates/rules.py (method.md 4a)."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.certificates.alpha import METHODS, alpha_shares
from models.certificates.bounds import clopper_pearson_lower, clopper_pearson_upper
from models.certificates.counts import runner_up
from models.certificates.rules import certified_radius, certify, check_certify

# A busy machine must not fail a property for taking its time.
UNHURRIED = settings(deadline=None)
COUNTS = st.lists(st.integers(0, 2000), min_size=2, max_size=6).filter(lambda c: sum(c) >= 40)


def tally(k: int, rival: int, n: int = 1000) -> list[int]:
    """k votes for class 0, `rival` for class 1, the rest in parts that are no larger."""
    parts, rest = [k, rival], n - k - rival
    while rest:
        parts.append(min(rest, max(1, rival)))
        rest -= parts[-1]
    return parts


@pytest.mark.parametrize(
    ("k", "rival", "one_sided", "two_sided"),
    [
        (1000, 0, 2.4633, 2.4578),
        (990, 5, 1.9780, 2.0204),
        (950, 25, 1.4399, 1.5475),
        (900, 50, 1.1145, 1.2569),
        (800, 100, 0.7013, 0.8910),
        (600, 200, 0.1284, 0.4003),
        (500, 250, 0.0, 0.1945),
    ],
)
def test_known_answers(k: int, rival: int, one_sided: float, two_sided: float) -> None:
    """Radii in sigma at n = 1,000 and alpha = 0.001 are those of method.md 4a; 0 abstains."""
    votes = tally(k, rival)
    selection = [1] + [0] * (len(votes) - 1)
    for method, radius in (("cohen", one_sided), ("two-sided", two_sided)):
        got = certify(selection, votes, 1.0, 0.001, method=method)
        assert got.radius == pytest.approx(radius, abs=5.1e-5)
        assert got.abstained == (radius == 0.0)


def test_two_sided_is_the_default_and_fills_every_field() -> None:
    """The certificate names the runner-up and bounds both sides at their shares of alpha."""
    got = certify([1, 99, 0], [200, 600, 200], 0.5, 0.001)
    assert (got.label, got.runner_up, got.method) == (1, 0, "two-sided")
    assert got.p_lower == pytest.approx(clopper_pearson_lower(600, 1000, 0.0009), abs=1e-12)
    assert got.p_upper == pytest.approx(clopper_pearson_upper(200, 1000, 0.0001), abs=1e-12)
    assert got.radius == certified_radius(got.p_lower or 0.0, 0.5, got.p_upper)
    assert (got.target_radius, got.target_reached) == (None, None)


def test_a_class_below_one_half_is_certified() -> None:
    """A plurality that is sure of its lead has a radius, where Cohen's rule abstains."""
    votes = tally(400, 100)
    selection = [1] + [0] * (len(votes) - 1)
    got = certify(selection, votes, 1.0, 0.001)
    assert got.p_lower is not None
    assert got.p_lower < 0.5
    assert got.radius is not None
    assert got.radius > 0.35
    assert certify(selection, votes, 1.0, 0.001, method="cohen").abstained


@UNHURRIED
@given(COUNTS, st.sampled_from([0.05, 0.001, 1e-9]), st.sampled_from([0.0, 1e-12, 0.01]))
def test_the_runner_up_never_costs_a_radius(
    votes: list[int], alpha: float, distance: float
) -> None:
    """The radius is at least that of p_lower alone, and equal to it with two classes."""
    got = certify(votes, votes, 0.5, alpha, total_variation=distance)
    assert got.p_lower is not None
    assert got.p_upper is not None
    assert got.radius is not None
    alone = certified_radius(got.p_lower, 0.5)
    assert got.radius >= alone
    assert Fraction(got.p_upper) <= 1 - Fraction(got.p_lower) or got.p_lower < 0.5
    assert got.abstained == (got.p_lower <= got.p_upper)
    if len(votes) == 2:
        assert got.radius == alone


@UNHURRIED
@given(COUNTS, st.floats(1e-12, 0.4))
def test_imperfect_noise_moves_both_bounds_outwards(votes: list[int], distance: float) -> None:
    """A total variation is taken from p_lower and added to p_upper, and never helps."""
    ideal = certify(votes, votes, 0.5, 0.01)
    real = certify(votes, votes, 0.5, 0.01, total_variation=distance)
    assert (real.p_lower or 0.0) <= max(0.0, (ideal.p_lower or 0.0) - distance)
    assert (real.p_upper or 1.0) >= min(1.0, (ideal.p_upper or 1.0) + distance) - 1e-12
    assert (real.radius or 0.0) <= (ideal.radius or 0.0)


def test_a_rival_votes_more_and_the_class_is_not_certified() -> None:
    """The selection alone chooses the class; a class that trails afterwards abstains."""
    got = certify([51, 49], [300, 700], 0.5, 0.001)
    assert (got.label, got.abstained, got.radius, got.runner_up) == (None, True, 0.0, 1)


def test_the_runner_up_is_the_lowest_of_equal_others() -> None:
    """The class itself is never its own runner-up."""
    assert runner_up(0, (9, 3, 5, 5)) == 2
    assert runner_up(2, (1, 1, 0)) == 0
    assert runner_up(1, (0, 4)) == 0


# --- Shares --------------------------------------------------------------------------------------

SETTINGS = [(method, False) for method in METHODS] + [("anytime", False), ("anytime", True)]


@UNHURRIED
@given(st.floats(1e-98, 0.5), st.sampled_from(SETTINGS))
def test_shares_sum_to_at_most_alpha(alpha: float, setting: tuple[str, bool]) -> None:
    """As exact fractions they never exceed alpha, and miss it by no more than rounding."""
    total = sum(map(Fraction, alpha_shares(setting[0], alpha, setting[1]).values()))
    assert total <= Fraction(alpha)
    assert total >= Fraction(alpha) * (1 - Fraction(1, 2**51))


def test_shares_are_those_of_the_method() -> None:
    """0.9 and 0.1; 0.72, 0.08 and 0.2 with a target, 0.81, 0.09 and 0.1 without (method.md 4b)."""
    for (method, with_target), parts in zip(
        SETTINGS,
        (
            {"label": 0.9, "runner_up": 0.1},
            {"label": 1.0},
            {"label": 0.81, "runner_up": 0.09, "looks": 0.1},
            {"label": 0.72, "runner_up": 0.08, "looks": 0.2},
        ),
        strict=True,
    ):
        shares = alpha_shares(method, 0.001, with_target)
        assert shares == pytest.approx({name: part * 0.001 for name, part in parts.items()})


def test_shares_that_are_too_small_are_refused() -> None:
    """A share below 1e-100 is a ValueError that names alpha, and so is an unknown method."""
    for method, alpha in (("cohen", 9e-101), ("two-sided", 9e-100), ("anytime", 1e-99)):
        with pytest.raises(ValueError, match=r"^alpha = "):
            alpha_shares(method, alpha, True)
    for with_target, alpha in ((False, 1.12e-99), (True, 1.26e-99)):
        assert min(alpha_shares("anytime", alpha, with_target).values()) >= 1e-100
    with pytest.raises(ValueError, match=r"^method = goodman: must be one of two-sided, cohen"):
        check_certify(100, 1000, 0.25, 0.001, "goodman")
