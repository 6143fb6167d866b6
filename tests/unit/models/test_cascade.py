"""models/certificates/cascade.py: which stage answers, and with what radius (method.md 4c)."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri

from models.certificates.alpha import stage_shares
from models.certificates.bounds import clopper_pearson_lower, clopper_pearson_upper
from models.certificates.cascade import (
    Cascade,
    certify_cascade,
    check_cascade,
    is_passed,
)
from models.certificates.rules import Certificate

QUESTION = Cascade((1.0, 0.5, 0.25), 0.001, 100, 1000)
SURE = ((100, 0, 0), (990, 6, 4))
SPREAD = ((40, 30, 30), (400, 350, 250))
CLOSE = ((60, 20, 20), (480, 300, 220))
LEVEL = 0.001 / 6


def answered(*stages: tuple[tuple[int, ...], tuple[int, ...]]) -> Certificate:
    return certify_cascade(QUESTION, stages[-1][0], [votes for _, votes in stages])


def test_the_first_stage_answers_by_its_own_bound() -> None:
    """Without a passed stage the radius is sigma Phi^-1(p_lower) at alpha / 2S."""
    got = answered(SURE)
    p_lower = clopper_pearson_lower(990, 1000, LEVEL)
    assert (len(got.stages), got.label, got.sigma) == (1, 0, 1.0)
    assert got.p_lower == pytest.approx(p_lower, abs=1e-12)
    assert got.radius == pytest.approx(ndtri(p_lower), abs=1e-9)
    assert (got.method, got.alpha) == ("cascade", 0.001)
    assert (got.n0, got.n) == (100, 1000)


def test_a_passed_stage_limits_the_radius() -> None:
    """The others' bound at the passed stage leaves out the answer's own votes there."""
    got = answered(SPREAD, SURE)
    p_upper = clopper_pearson_upper(350, 1000, LEVEL)
    kept = -1.0 * float(ndtri(p_upper))
    answers = 0.5 * float(ndtri(clopper_pearson_lower(990, 1000, LEVEL)))
    assert (len(got.stages), got.label, got.sigma) == (2, 0, 0.5)
    assert [bound.radius for bound in got.stages] == [
        pytest.approx(kept, abs=1e-9),
        pytest.approx(answers, abs=1e-9),
    ]
    assert got.stages[0].p_upper == pytest.approx(p_upper, abs=1e-12)
    assert got.radius == min(bound.radius for bound in got.stages)
    assert got.counts == SURE[1]


def test_every_passed_stage_limits_the_radius() -> None:
    """With three stages the least of three numbers counts, here the second stage's."""
    got = answered(SPREAD, ((40, 30, 30), (200, 400, 400)), SURE)
    assert (len(got.stages), got.label) == (3, 0)
    radii = [bound.radius for bound in got.stages]
    assert got.radius == min(radii) == radii[1]


def test_between_the_bounds_the_cascade_abstains() -> None:
    """A stage that may or may not have a class above 1/2 is not passed, whatever comes after."""
    for stages in ((CLOSE,), (SPREAD, CLOSE)):
        got = answered(*stages)
        assert (got.label, got.abstained) == (None, True)
        assert got.radius == 0.0


def test_the_last_stage_is_never_passed() -> None:
    """A cascade whose stages are all spread abstains at its last one."""
    got = answered(SPREAD, SPREAD, SPREAD)
    assert (got.abstained, len(got.stages), got.sigma) == (True, 3, 0.25)


def test_votes_after_the_selection_do_not_choose_the_class() -> None:
    """A class that the selection did not name is not answered, though it has the votes."""
    assert answered(((51, 49, 0), (4, 990, 6))).abstained


def test_whether_a_stage_is_passed_reads_every_class() -> None:
    """The selected class counts too: CPhi of the largest count must not lie above 1/2."""
    assert is_passed(QUESTION, (400, 350, 250))
    assert not is_passed(QUESTION, (480, 300, 220))
    assert not is_passed(QUESTION, (300, 480, 220))
    assert not is_passed(replace(QUESTION, total_variation=0.1), (400, 350, 250))


def test_total_variation_widens_every_bound() -> None:
    """It lowers the answer's bound and raises a passed stage's."""
    blurred = replace(QUESTION, total_variation=0.01)
    plain, got = answered(SPREAD, SURE), certify_cascade(blurred, SURE[0], [SPREAD[1], SURE[1]])
    assert got.stages[0].p_upper == pytest.approx((plain.stages[0].p_upper or 0.0) + 0.01)
    assert got.stages[1].p_lower == pytest.approx((plain.stages[1].p_lower or 0.0) - 0.01)


@given(st.floats(1e-98, 0.5), st.integers(2, 4))
def test_shares_sum_to_at_most_alpha(alpha: float, stages: int) -> None:
    """Two a stage, all equal; as exact fractions they never exceed alpha."""
    shares = stage_shares(alpha, stages)
    assert len(shares) == 2 * stages
    assert len(set(shares.values())) == 1
    total = sum(map(Fraction, shares.values()))
    assert Fraction(alpha) * (1 - Fraction(1, 2**50)) <= total <= Fraction(alpha)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 1000, (0.5,), 0.001), r"^sigma has 1 values: must be 2 to 4$"),
        ((100, 1000, (5.0, 4.0, 3.0, 2.0, 1.0), 0.001), r"^sigma has 5 values: must be 2 to 4$"),
        ((100, 1000, (0.5, 0.5), 0.001), r"^sigma = \[0.5, 0.5\]: must descend$"),
        ((100, 1000, (0.5, 0.0), 0.001), r"^sigma = 0.0: must be finite and greater than 0$"),
        ((0, 1000, (0.5, 0.25), 0.001), r"^n0 = 0: "),
        ((100, 11, (0.5, 0.25), 0.001), r"^n = 11 at alpha = 0.001 .* that works is 12$"),
        ((100, 1000, (0.5, 0.25), 0.6), r"^alpha = 0.6"),
        ((100, 1000, (0.5, 0.25), 3e-100), r"^alpha = 3e-100: the share of a stage's side"),
    ],
)
def test_impossible_cascades_are_refused_by_name(arguments: Any, message: str) -> None:
    """Field, value and limit stand in the message."""
    with pytest.raises(ValueError, match=message):
        check_cascade(*arguments)


def test_the_smallest_n_of_a_cascade_answers() -> None:
    """At alpha = 0.001 two stages need 12 unanimous rows."""
    check_cascade(100, 12, (0.5, 0.25), 0.001)
    smallest = Cascade((0.5, 0.25), 0.001, 100, 12)
    assert certify_cascade(smallest, (100, 0), [(12, 0)]).label == 0


@pytest.mark.parametrize(
    ("selection", "stages", "message"),
    [
        (SURE[0], [], r"^0 stages were read: must be 1 to 3$"),
        (SURE[0], [SPREAD[1]] * 4, r"^4 stages were read: must be 1 to 3$"),
        (SPREAD[0], [SPREAD[1]], r"^stage 1 is passed, and the next is missing$"),
        (SURE[0], [CLOSE[1], SURE[1]], r"^stage 1 is not passed, so it is the last$"),
        (SURE[0], [SPREAD[1], SURE[1], SURE[1]], r"^stage 2 is not passed, so it is the last$"),
        ((99, 0, 0), [SURE[1]], r"^stage 1 has 99 and 1000 votes: must have n0 = 100 and n"),
        (SURE[0], [SPREAD[1], (990, 6, 3)], r"^stage 2 has 100 and 999 votes"),
        ((100, 0), [SURE[1]], r"2 classes and estimation_counts 3"),
    ],
)
def test_missing_and_malformed_stages_are_refused(
    selection: Any, stages: Any, message: str
) -> None:
    """Exactly the stages up to the first one that is not passed make an answer."""
    with pytest.raises(ValueError, match=message):
        certify_cascade(QUESTION, selection, stages)


def test_an_impossible_total_variation_is_refused() -> None:
    """It is a probability below 1/2."""
    with pytest.raises(ValueError, match=r"^total_variation = -0.1"):
        certify_cascade(replace(QUESTION, total_variation=-0.1), SURE[0], [SURE[1]])
