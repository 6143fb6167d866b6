"""Simulated errors of the rules: at most alpha against the true radius, whatever the other votes.

Every setting's failures must stay within the 1 - 1e-6 quantile of Binomial(runs, alpha). Some
settings also bound them from below, for a rule that hardly errs is not sharp.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import binom

from models.certificates.anytime import Anytime, certify_anytime, look_schedule
from models.certificates.bounds import anytime_lower, log_e
from models.certificates.cascade import Cascade, certify_cascade, is_passed
from models.certificates.rules import certify

RUNS = 20_000
LAYOUTS = ("even", "rival", "between")


def probabilities(p: float, classes: int, layout: str) -> NDArray[np.float64]:
    """p for class 0; the rest evenly, on class 1 alone, or half and half."""
    even = np.full(classes - 1, (1.0 - p) / (classes - 1))
    rival = np.zeros(classes - 1)
    rival[0] = 1.0 - p
    others = {"even": even, "rival": rival, "between": (even + rival) / 2.0}[layout]
    return np.concatenate([[p], others])


def true_radius(p: NDArray[np.float64], label: int) -> float:
    """The largest radius, in sigma, that probabilities (K,) prove for the label; at least 0."""
    return max(0.0, float(ndtri(p[label]) - ndtri(np.delete(p, label).max())) / 2.0)


def compressed(k: int, most: int, n: int) -> list[int]:
    """Votes with the same class and runner-up as a tally of many classes, and as few zeros."""
    votes, rest = [k, most], n - k - most
    while rest:
        votes.append(min(rest, most))
        rest -= votes[-1]
    return votes


def most_allowed(alpha: float, runs: int = RUNS) -> float:
    return float(binom.ppf(1 - 1e-6, runs, alpha))


def strongest_other(votes: NDArray[np.int64], label: int) -> NDArray[np.int64]:
    """The largest count of another class, over the runs of (runs, K)."""
    below = votes[:, :label].max(axis=1, initial=0)
    return np.maximum(below, votes[:, label + 1 :].max(axis=1, initial=0))


def wrong(
    votes: NDArray[np.int64], label: int, truth: float, radius_of: Callable[[list[int]], float]
) -> NDArray[np.bool_]:
    """Whether the radius of each run's votes (runs, K) lies above the truth.

    The radius shrinks with the runner-up's count, so one limit is searched for each count of the
    label, which is class 0 of the tallies that `radius_of` gets.
    """
    rows = int(votes[0].sum())

    @functools.cache
    def limit(k: int) -> int:
        """The smallest count of the runner-up with which the radius is right."""
        if k == rows:
            return int(radius_of([k, 0]) > truth)
        mosts = range(1, rows - k + 1)
        return 1 + bisect_left(
            mosts, True, key=lambda most: radius_of(compressed(k, most, rows)) <= truth
        )

    limits = np.array([limit(k) for k in votes[:, label].tolist()])
    return strongest_other(votes, label) < limits


@pytest.mark.parametrize(
    ("classes", "layout"), [(2, "rival"), *itertools.product((10, 1000), LAYOUTS)]
)
def test_the_two_sided_rule_errs_at_most_at_alpha(classes: int, layout: str) -> None:
    """Over class probabilities and levels, for the most likely class and for a weaker one."""
    random = np.random.default_rng(4)
    for p in (0.4, 0.6, 0.95):
        truth = probabilities(p, classes, layout)
        votes = random.multinomial(1000, truth, RUNS)
        for alpha, label in itertools.product((0.05, 0.001), (0, 1)):

            def radius_of(tally: list[int], alpha: float = alpha) -> float:
                selection = [1] + [0] * (len(tally) - 1)
                return certify(selection, tally, 1.0, alpha).radius or 0.0

            failures = wrong(votes, label, true_radius(truth, label), radius_of).sum()
            assert failures <= most_allowed(alpha), (p, alpha, label)
            if (classes, label, alpha) == (2, 0, 0.05) and p > 0.5:
                assert failures >= 0.4 * alpha * RUNS


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.6, 0.84, 0.98, 0.99])
def test_an_adversary_who_stops_at_any_row_errs_at_most_at_the_level(p: float) -> None:
    """Rows are drawn until the bound exceeds the true p, which it may do after any of 2,500."""
    rows, level = 2500, 0.01
    # The fewest votes with which the bound lies above p, for every number of rows.
    least, k = np.empty(rows, np.int64), 1
    for m in range(1, rows + 1):
        while k <= m and log_e(k, m, p) < -np.log(level):
            k += 1
        least[m - 1] = k
    for m in (30, 700, rows):
        if (k := int(least[m - 1])) <= m:
            assert anytime_lower(k, m, level) >= p > anytime_lower(k - 1, m, level)

    random = np.random.default_rng(5)
    failures = 0
    for _ in range(RUNS // 2000):
        votes = np.cumsum(random.random((2000, rows), np.float32) < p, axis=1, dtype=np.int16)
        failures += int((votes >= least).any(axis=1).sum())
    assert failures <= most_allowed(level)
    assert failures >= 0.1 * level * RUNS


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize(("classes", "layout"), [(2, "even"), (10, "even"), (10, "between")])
def test_early_stopping_errs_at_most_at_alpha(classes: int, layout: str, with_target: bool) -> None:
    """Reading every look and the last answer shows a wrong radius at a rate of at most alpha.

    With a target equal to the true radius, which is where stopping is tempting.
    """
    n, alpha = 1000, 0.05
    random = np.random.default_rng(6)
    for p in (0.6, 0.9, 0.99):
        truth = probabilities(p, classes, layout)
        radius = true_radius(truth, 0)
        target = radius if with_target else None
        looks = look_schedule(n, 1.0, alpha, target)

        def radius_of(tally: list[int], target: float | None = target) -> float:
            question = Anytime(1.0, alpha, 1, n, target, (sum(tally),), 0.0)
            selection = [1] + [0] * (len(tally) - 1)
            return certify_anytime(question, selection, [tally]).radius or 0.0

        votes = np.zeros((RUNS, classes), np.int64)
        failed = np.zeros(RUNS, bool)
        for before, rows in itertools.pairwise((0, *looks)):
            votes += random.multinomial(rows - before, truth, RUNS)
            failed |= wrong(votes, 0, radius, radius_of)
        assert failed.sum() <= most_allowed(alpha), p
        if classes == 2:
            assert failed.sum() >= 0.2 * alpha * RUNS


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # The first level's class lies barely above 1/2: passing it is wrong.
        ((0.25, 0.501, 0.249), (0.99, 0.005, 0.005)),
        # The first level, which is passed, limits the radius to 0.253.
        ((0.3, 0.4, 0.3), (0.95, 0.03, 0.02)),
        # Nothing lies above 1/2 at either level.
        ((0.2, 0.3, 0.5), (0.5, 0.25, 0.25)),
    ],
)
def test_a_cascade_errs_at_most_at_alpha(
    first: tuple[float, ...], second: tuple[float, ...]
) -> None:
    """Radii above what the true probabilities at both noise levels prove keep to alpha."""
    question = Cascade((1.0, 0.5), 0.1, 10, 400)
    random = np.random.default_rng(7)
    votes = [random.multinomial(question.n, p, RUNS).tolist() for p in (first, second)]
    chosen = [random.multinomial(question.n0, p, RUNS).tolist() for p in (first, second)]

    def truth(stage: int, label: int) -> float:
        kept = question.sigmas[stage] * float(ndtri((first, second)[stage][label]))
        if stage == 1:
            others = max(first[:label] + first[label + 1 :])
            kept = min(kept, -question.sigmas[0] * float(ndtri(others)))
        return max(0.0, kept)

    failures = 0
    for run in range(RUNS):
        last = 1 if is_passed(question, votes[0][run]) else 0
        read = [votes[stage][run] for stage in range(last + 1)]
        got = certify_cascade(question, chosen[last][run], read)
        if got.label is not None:
            assert got.radius is not None
            failures += got.radius > truth(len(got.stages) - 1, got.label)
    assert failures <= most_allowed(question.alpha)
    assert failures >= 0.05 * question.alpha * RUNS
