"""Audit of a certification log: do its votes come from independent noise rows?

Noise that is drawn once and used on g devices gives every vote g times. The votes that an image
misses are then a multiple of g, and only n/g rows are independent. The counts of votes stand behind
the printed radii (method.md section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import binom

from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import certified_radius, check_certify
from models.evaluation.logs.printed_radii import Inversion, invert
from models.evaluation.logs.reading import Line
from models.evaluation.scores import EPSILONS, average_certified_radius, certified_accuracy

FACTORS = range(2, 17)
"""How often the same noise may have been used."""
MULTIPLES = 5
"""Multiples of a factor, from itself on, among the missing votes that its test reads."""
LEVEL = 0.001
"""Largest p-value, over all factors together, that is a finding."""
MOST_ROWS = 1_000_000
MOST_INCONSISTENT = 0.1
"""Largest share of radii that no count gives; with more, the settings are not the log's."""


class FactorTest(NamedTuple):
    """The test of one factor.

    Of the `tallies` that miss 1 to `window` votes, as far as radii show it, `multiples` miss a
    multiple of the factor. Independent rows make a tally do so with probability at most `chance`.
    `p_value` is without regard to other factors, and `log_p` its natural logarithm.
    """

    factor: int
    window: int
    tallies: int
    multiples: int
    chance: float
    p_value: float
    log_p: float


class Table(NamedTuple):
    """Certified accuracy by radius (l2, [0,1] pixel units), and the average certified radius."""

    certified: dict[float, float]
    average_certified_radius: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What a log shows.

    `p_value` is the smallest of the `tests`, multiplied by their number. `least_p_value` is the
    smallest that as many tallies could give. `factor` is how often the noise was used: that of the
    smallest p-value where it is at most LEVEL, else 1. `missing` are the counts above n - factor
    and below n that no image has. `effective_n` is n over the factor. `remaining` is the table with
    that many rows and the votes over the factor, both rounded down; None without a finding.
    """

    images: int
    certified: int
    inversion: Inversion
    tests: tuple[FactorTest, ...]
    p_value: float
    least_p_value: float
    factor: int
    missing: tuple[int, ...]
    effective_n: int
    printed: Table
    remaining: Table | None

    @property
    def found(self) -> bool:
        """Whether the log shows reused noise."""
        return self.factor > 1

    @property
    def conclusive(self) -> bool:
        """Whether a log with as many near-full tallies can show reused noise."""
        return self.least_p_value <= LEVEL


def audit(lines: Sequence[Line], n: int, sigma: float, alpha: float) -> Audit:
    """The audit of a log whose radii are by Cohen's rule, from `n` estimation rows an image.

    The p-value holds for independent rows and images, whatever the images' probabilities are.
    Raises ValueError for settings that could certify nothing, for n above MOST_ROWS, for a log
    without a certified image, and for settings that cannot be those of the log.
    """
    check_certify(1, n, sigma, alpha, "cohen")
    if n > MOST_ROWS:
        raise ValueError(f"n = {n}: the largest n of an audit is {MOST_ROWS}")
    certified = [line for line in lines if line.certified]
    if not certified:
        raise ValueError("the log has no certified image, so no counts")
    inversion = invert([line.radius for line in certified], n, sigma, alpha)
    settings = f"n = {n}, sigma = {sigma:g}, alpha = {alpha:g}"
    _check(certified, inversion, settings)
    known = (inversion.least == inversion.most) & (inversion.least > 0)
    missed = n - inversion.least[known]
    tests = tuple(factor_tests(missed, n, inversion.readable))
    best = min(tests, key=lambda test: test.log_p, default=None)
    p_value = joint_p_value(tests)
    least = min((len(tests) * test.chance**test.tallies for test in tests), default=1.0)
    factor = best.factor if best and p_value <= LEVEL else 1
    if factor > 1 and inversion.full == 0:
        raise ValueError(
            f"no image has all {n} votes, and the tallies below are no independent rows' of "
            f"{settings}: a smaller n explains both, so give the log's own settings"
        )
    votes = dict(zip([line.index for line in certified], inversion.least.tolist(), strict=True))
    return Audit(
        len(lines),
        len(certified),
        inversion,
        tests,
        p_value,
        min(1.0, least),
        factor,
        tuple(n - m for m in range(factor - 1, 0, -1) if m not in missed),
        n // factor,
        _table([float(line.radius) for line in lines], [line.correct for line in lines]),
        _remaining(lines, votes, factor, n, sigma, alpha) if factor > 1 else None,
    )


def factor_tests(
    missed: NDArray[np.int64], n: int, readable: NDArray[np.int64]
) -> list[FactorTest]:
    """The tests of all factors that the print allows, whatever the tallies are.

    `missed` (N,) are the votes that tallies miss, where their radius shows it; `readable` (M,) all
    numbers, ascending, that a radius can show.
    """
    tests = []
    for factor in FACTORS:
        values = _window(readable, factor)
        if not len(values):
            continue
        near_full = missed[np.isin(missed, values)]
        tallies, multiples = len(near_full), int((near_full % factor == 0).sum())
        chance = largest_chance(factor, tuple(values.tolist()), n)
        p_value, log_p = (
            float(tail(multiples - 1, tallies, chance)) for tail in (binom.sf, binom.logsf)
        )
        tests.append(
            FactorTest(factor, int(values[-1]), tallies, multiples, chance, p_value, log_p)
        )
    return tests


def joint_p_value(tests: Sequence[FactorTest]) -> float:
    """The p-value of the best test, given that it is the best of several (Bonferroni); 1 of none.

    With probability at most p, independent rows give a value of at most p.
    """
    return min((1.0, *(len(tests) * test.p_value for test in tests)))


def _window(readable: NDArray[np.int64], factor: int) -> NDArray[np.int64]:
    """The numbers of missing votes that the factor's test reads; none where none is a multiple.

    They end below a multiple: the last value is the most probable of tallies that mostly miss
    more, so it must be none.
    """
    values = readable[readable < factor * (MULTIPLES + 1)]
    others = np.flatnonzero(values % factor)
    values = values[: others[-1] + 1] if len(others) else values[:0]
    return values if (values % factor == 0).any() else values[:0]


@cache
def largest_chance(factor: int, values: tuple[int, ...], n: int) -> float:
    """Largest probability, over all p, that Binomial(n, p) is a multiple of the factor.

    Given that it is one of the `values`. It is not 1/factor: where the mean is the factor, that is
    the most probable value. A tally of independent rows is a multiple no more often, whatever its p
    is, so Binomial(tallies, chance) bounds the number of multiples.
    """
    missed = np.array(values)
    weights = -gammaln(missed + 1) - gammaln(n - missed + 1)
    low, high, largest = 1e-2, 1e2 * values[-1], 0.0
    for _ in range(2):  # All means of missing votes, then those around the best.
        means = np.geomspace(low, high, 2001)
        logs = weights + missed * np.log(means / n)[:, None]
        mass = np.exp(logs - logs.max(1, keepdims=True))
        chances = mass[:, missed % factor == 0].sum(1) / mass.sum(1)
        best = int(chances.argmax())
        low, high = means[max(0, best - 1)], means[min(2000, best + 1)]
        largest = float(chances[best])
    return largest


def _check(certified: Sequence[Line], inversion: Inversion, settings: str) -> None:
    """Raises ValueError where the radii cannot be those of the settings."""
    top = max(certified, key=lambda line: line.radius)
    if float(top.radius) > inversion.largest * (1 + 1e-9):
        raise ValueError(
            f"radius = {top.radius} of idx {top.index}: the largest is {inversion.largest:g} for "
            f"{settings}; give the log's own settings"
        )
    if inversion.inconsistent > MOST_INCONSISTENT * len(certified):
        raise ValueError(
            f"{inversion.inconsistent} of {len(certified)} radii are not those of Cohen's rule for "
            f"{settings}; give the log's own settings; other rules cannot be audited"
        )


def _table(radii: Sequence[float], right: Sequence[bool]) -> Table:
    certified = {epsilon: certified_accuracy(radii, right, epsilon) for epsilon in EPSILONS}
    return Table(certified, average_certified_radius(radii, right))


def _remaining(
    lines: Sequence[Line], votes: Mapping[int, int], factor: int, n: int, sigma: float, alpha: float
) -> Table:
    """The table with one of every `factor` rows and votes; a radius without a count is 0."""

    @cache
    def radius(k: int) -> float:
        return certified_radius(clopper_pearson_lower(k, n // factor, alpha), sigma)

    radii = [radius(votes.get(line.index, 0) // factor) for line in lines]
    return _table(radii, [line.correct and r > 0 for line, r in zip(lines, radii, strict=True)])
