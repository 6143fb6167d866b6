"""certificates/anytime.py: the looks, what they decide, and what is certified after them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.certificates.anytime import (
    Anytime,
    Decision,
    at_look,
    bound,
    certify_anytime,
    check_anytime,
    largest_target,
    look_schedule,
    smallest_n_target,
)
from models.certificates.bounds import anytime_lower
from models.certificates.rules import certified_radius, certify

# A busy machine must not fail a property for taking its time.
UNHURRIED = settings(deadline=None)
SELECTION = (16, 0, 0)


def asked(
    n: int = 10_000, target: float | None = 0.25, sigma: float = 0.25, alpha: float = 0.001
) -> Anytime:
    looks = look_schedule(n, sigma, alpha, target, 1e-12)
    return Anytime(sigma, alpha, 16, n, target, looks, 1e-12)


def seen(question: Anytime, looks: int, p: tuple[float, ...]) -> list[tuple[int, ...]]:
    """Votes at the first looks, in shares p of the classes after the first, rounded down."""
    votes = []
    for rows in question.looks_schedule[:looks]:
        others = [int(rows * share) for share in p[1:]]
        votes.append((rows - sum(others), *others))
    return votes


def until_decided(question: Anytime, p: tuple[float, ...]) -> tuple[Decision, int]:
    """The first decision but CONTINUE, and the number of looks until it."""
    for looks in range(1, len(question.looks_schedule) + 1):
        decision = at_look(question, SELECTION, seen(question, looks, p))
        if decision is not Decision.CONTINUE:
            return decision, looks
    raise AssertionError("the last look decides")


# --- The schedule --------------------------------------------------------------------------------


def test_looks_of_ten_thousand_rows() -> None:
    """32, then a quarter more, rounded up to 16; n is the last."""
    looks = look_schedule(10_000, 0.25, 0.001)
    assert looks[:10] == (32, 48, 64, 80, 112, 144, 192, 240, 304, 384)
    assert looks[-3:] == (7264, 9088, 10_000)


@pytest.mark.parametrize(("target", "rows", "look"), [(1.0, 57, 64), (2.0, 425, 432)])
def test_the_first_look_that_can_prove_the_target_is_one(
    target: float, rows: int, look: int
) -> None:
    """At level 0.0002, 57 rows prove sigma and 425 two sigma; the next multiple of 16 is a look."""
    level = 0.0002
    assert certified_radius(anytime_lower(rows, rows, level), 1.0) >= target
    assert certified_radius(anytime_lower(rows - 1, rows - 1, level), 1.0) < target
    assert look in look_schedule(10_000, 1.0, 0.001, target)


@UNHURRIED
@given(
    st.integers(1, 100_000),
    st.floats(1e-20, 0.5),
    st.none() | st.floats(0.01, 5.0),
    st.sampled_from([0.0, 1e-12]),
)
def test_a_schedule_ascends_to_n(
    n: int, alpha: float, target: float | None, distance: float
) -> None:
    """It ascends strictly, ends at n, has its other looks on multiples of 16, and few of them."""
    looks = look_schedule(n, 1.0, alpha, target, distance)
    assert all(before < after for before, after in pairwise(looks))
    assert looks[-1] == n
    assert not any(rows % 16 for rows in looks[:-1])
    assert len(looks) <= 40


# --- Decisions -----------------------------------------------------------------------------------


def test_agreement_reaches_a_target_within_eighty_rows() -> None:
    """A unanimous image is certified at r = sigma, at alpha = 0.001, in at most 80 rows."""
    question = asked()
    decision, looks = until_decided(question, (1.0, 0.0, 0.0))
    assert decision is Decision.REACHED
    assert question.looks_schedule[looks - 1] <= 80
    got = certify_anytime(question, SELECTION, seen(question, looks, (1.0, 0.0, 0.0)))
    assert (got.label, got.target_radius, got.target_reached) == (0, 0.25, True)
    assert got.radius is not None
    assert got.radius >= 0.25
    assert (got.p_upper, got.runner_up, got.n, sum(got.counts)) == (None, 1, 10_000, 64)


def test_an_image_far_below_the_target_is_given_up_early() -> None:
    """p_A = 0.6 against 0.4 cannot reach r = sigma; what is proven until then is certified."""
    question = asked()
    decision, looks = until_decided(question, (0.6, 0.4, 0.0))
    assert decision is Decision.HOPELESS
    assert question.looks_schedule[looks - 1] < 200
    later = len(question.looks_schedule) - 1
    got = certify_anytime(question, SELECTION, seen(question, later, (0.6, 0.4, 0.0)))
    assert (got.label, got.target_reached) == (0, False)
    assert got.radius is not None
    assert 0.0 < got.radius < 0.25


def test_a_weak_runner_up_is_not_hopeless() -> None:
    """p_A = 0.8 against 0.05 has a true radius of 1.24 sigma: all rows are drawn, and prove it."""
    question = asked()
    p = (0.8, 0.05, 0.05, 0.05, 0.05)
    selection = (16, 0, 0, 0, 0)
    decisions = [
        at_look(question, selection, seen(question, looks + 1, p))
        for looks in range(len(question.looks_schedule))
    ]
    assert decisions[-1] is Decision.END
    assert set(decisions[:-1]) == {Decision.CONTINUE}
    got = certify_anytime(question, selection, seen(question, len(decisions), p))
    assert got.target_reached
    assert got.p_upper is not None
    # The bound on the class alone would not have.
    assert certified_radius(got.p_lower or 0.0, 0.25) < 0.25


def test_without_a_target_only_the_last_look_ends() -> None:
    """Every look before n continues, even a unanimous or a lost one."""
    question = asked(n=1000, target=None)
    for p in ((1.0, 0.0, 0.0), (0.1, 0.9, 0.0)):
        assert until_decided(question, p) == (Decision.END, len(question.looks_schedule))
    got = certify_anytime(question, SELECTION, seen(question, 3, (1.0, 0.0, 0.0)))
    assert (got.target_radius, got.target_reached, got.label) == (None, None, 0)


def test_a_missed_decision_still_counts() -> None:
    """What an earlier look has proven is reached at a later one, though its own votes are worse."""
    question = asked()
    votes = [*seen(question, 3, (1.0, 0.0, 0.0)), (70, 10, 0)]
    assert at_look(question, SELECTION, votes[:3]) is Decision.REACHED
    assert at_look(question, SELECTION, votes) is Decision.REACHED
    assert certify_anytime(question, SELECTION, votes).target_reached


# --- Certificates --------------------------------------------------------------------------------


def test_the_running_bound_is_the_best_look_so_far() -> None:
    """It never falls, is that of the e-process at its share, less the total variation."""
    question = asked(n=1000, target=None)
    votes = [(32, 0, 0), (40, 8, 0), (52, 12, 0)]
    best = anytime_lower(32, 32, 0.001 * 0.1)
    for looks in (1, 2, 3):
        rows, p_lower, radius = bound(question, SELECTION, votes[:looks])
        assert rows == question.looks_schedule[looks - 1]
        assert best - 2e-12 < p_lower < best
        assert radius == certified_radius(p_lower, 0.25)


@pytest.mark.parametrize("p", [(1.0, 0.0, 0.0), (0.95, 0.03, 0.02), (0.5, 0.3, 0.2)])
def test_on_all_rows_little_of_the_two_sided_radius_is_lost(p: tuple[float, ...]) -> None:
    """At n the answer is the two-sided rule's at 0.9 alpha: sharp where votes mostly agree."""
    question = asked(n=1000, target=None)
    votes = seen(question, len(question.looks_schedule), p)
    got = certify_anytime(question, SELECTION, votes)
    whole = certify(SELECTION, votes[-1], 0.25, 0.001, total_variation=1e-12)
    less = certify(SELECTION, votes[-1], 0.25, 0.0009, total_variation=1e-12)
    assert got.radius is not None
    assert whole.radius is not None
    assert 0.0 < (less.radius or 0.0) <= whole.radius
    if p[0] > 0.9:
        assert 0.995 * whole.radius <= got.radius < whole.radius
    assert (got.radius, got.p_upper) == (pytest.approx(less.radius), pytest.approx(less.p_upper))


@UNHURRIED
@given(st.integers(0, 500), st.integers(0, 500), st.sampled_from([None, 0.1, 0.3]))
def test_a_certificate_repeats_what_was_decided(
    misses: int, others: int, target: float | None
) -> None:
    """Radius, label, abstention and target agree with each other at every look."""
    question = asked(n=1000, target=target)
    for looks in range(1, len(question.looks_schedule) + 1):
        rows = question.looks_schedule[looks - 1]
        a, b = misses * rows // 1000, others * rows // 1000
        # The earlier looks have the same shares.
        votes = [
            (m - misses * m // 1000 - others * m // 1000, misses * m // 1000, others * m // 1000)
            for m in question.looks_schedule[:looks]
        ]
        assert votes[-1] == (rows - a - b, a, b)
        got = certify_anytime(question, SELECTION, votes)
        assert got.radius is not None
        assert got.abstained == (got.label is None) == (got.radius == 0.0)
        assert (got.target_reached is None) == (target is None)
        decided = at_look(question, SELECTION, votes)
        if decided is Decision.REACHED:
            assert got.target_reached
        if decided in (Decision.CONTINUE, Decision.HOPELESS) and target is not None:
            assert got.target_reached is False
        assert got.radius >= bound(question, SELECTION, votes).radius


# --- Targets and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "alpha"), [(0.25, 0.001), (0.5, 0.001), (0.3, 1e-9)])
def test_the_smallest_n_of_a_target_proves_it_and_one_less_does_not(
    target: float, alpha: float
) -> None:
    """Both limits agree, and unanimous rows at the limit do reach the target."""
    n = smallest_n_target(target, 0.25, alpha, 1e-12)
    assert n is not None
    assert largest_target(n, 0.25, alpha, 1e-12) >= target
    assert largest_target(n - 1, 0.25, alpha, 1e-12) < target
    check_anytime(16, n, 0.25, alpha, target, 1e-12)
    question = asked(n, target, 0.25, alpha)
    assert certify_anytime(
        question, SELECTION, seen(question, len(question.looks_schedule), (1.0, 0.0, 0.0))
    ).target_reached
    with pytest.raises(ValueError, match=rf"^target_radius = {target} .* that works is {n}$"):
        check_anytime(16, n - 1, 0.25, alpha, target, 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1000, 0.25, 0.001), r"^n0 = 0: the smallest n0 that works is 1$"),
        ((16, 10, 0.25, 0.001), r"^n = 10 at alpha = 0.001 .* that works is 11$"),
        ((16, 100_001, 0.25, 0.001), r"^n = 100001: the largest n of early stopping is 100000$"),
        ((16, 1000, -1.0, 0.001), r"^sigma = -1.0: must be finite"),
        ((16, 1000, 0.25, 0.7), r"^alpha = 0.7"),
        ((16, 1000, 0.25, 1e-99, 0.1), r"^alpha = 1e-99: the smallest of its shares is 8e-101"),
        ((16, 1000, 0.25, 0.001, 0.0), r"^target_radius = 0.0: must be finite and greater than 0$"),
        ((16, 1000, 0.25, 0.001, float("nan")), r"^target_radius = nan"),
        (
            (16, 1000, 0.25, 0.001, 0.7),
            r"^target_radius = 0.7 at n = 1000, .* 0.611654; .* 2829$",
        ),
        ((16, 1000, 0.25, 0.001, 9.0), r"^target_radius = 9.0 .* no n works$"),
        ((16, 1000, 0.25, 0.001, 0.1, 0.5), r"^total_variation = 0.5"),
    ],
)
def test_impossible_questions_are_refused_by_name(arguments: Any, message: str) -> None:
    """Field, value and limit; the same for what `certify` refuses."""
    with pytest.raises(ValueError, match=message):
        check_anytime(*arguments)


@pytest.mark.parametrize(
    ("selection", "looks", "message"),
    [
        ((15, 0, 0), [(32, 0, 0)], r"^selection_counts sum to 15: must be n0 = 16$"),
        (SELECTION, [], r"^looks has 0 looks: must be 1 to "),
        (SELECTION, [(32, 0)], r"^looks\[0\] has 2 classes and selection_counts 3"),
        (SELECTION, [(32, 0, 0), (47, 0, 0)], r"^looks\[1\] sums to 47: the schedule has 48"),
        (SELECTION, [(33, -1, 0)], r"^looks\[0\] holds -1"),
    ],
)
def test_looks_that_are_not_those_of_the_schedule_are_refused(
    selection: Any, looks: Any, message: str
) -> None:
    """No decision, bound or certificate follows from them."""
    for read in (at_look, bound, certify_anytime):
        with pytest.raises(ValueError, match=message):
            read(asked(), selection, looks)


def test_an_impossible_total_variation_is_refused() -> None:
    """A negative one would raise the bound."""
    question = Anytime(0.25, 0.001, 16, 32, None, (32,), -0.1)
    with pytest.raises(ValueError, match=r"^total_variation = -0.1"):
        certify_anytime(question, SELECTION, [(32, 0, 0)])


def test_numpy_counts_are_read() -> None:
    """Counts may come as arrays; the certificate holds plain integers."""
    got = certify_anytime(asked(), np.array(SELECTION), [np.array([30, 2, 0])])
    assert got.counts == (30, 2, 0)
    assert all(type(count) is int for count in got.counts)
