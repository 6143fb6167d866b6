"""Certificates of which the votes decide when to stop: method.md 4b.

One event carries every statement: the class's probability lies above its e-process bound at every
look, which fails with probability at most the looks' share of alpha. On all n rows the two-sided
rule is read at the rest of alpha.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from models.certificates.alpha import alpha_shares
from models.certificates.bounds import (
    anytime_lower,
    anytime_upper,
    lowered,
    quantile_down,
    quantile_up,
    raised,
)
from models.certificates.counts import Counts, checked_counts, runner_up
from models.certificates.limits import MOST_ROWS
from models.certificates.rules import (
    Certificate,
    bound_votes,
    certified_radius,
    check_certify,
    check_total_variation,
)

FIRST_LOOK, LOOK_GRID = 32, 16
"""Rows of the first look, and the multiple that further looks are rounded up to."""

HOPELESS_LEVEL = 0.005
"""Level of each bound by which a target is given up; it risks an abstention, never an error."""


class Decision(StrEnum):
    """The consequence of a look."""

    CONTINUE = "continue"
    REACHED = "reached"
    HOPELESS = "hopeless"
    END = "end"


@dataclass(frozen=True, slots=True)
class Anytime:
    """A question that may be answered early, as fixed before any row was drawn.

    `looks_schedule` has the estimation rows of every look, ascending, the last equal to `n`.
    `total_variation` is one row's. `target_radius` (l2, [0, 1] pixel scale) ends the rows once it
    is proven or hopeless; without one all n are drawn.
    """

    sigma: float
    alpha: float
    n0: int
    n: int
    target_radius: float | None
    looks_schedule: tuple[int, ...]
    total_variation: float

    @property
    def shares(self) -> dict[str, float]:
        """The parts of alpha, as `alpha_shares`."""
        return alpha_shares("anytime", self.alpha, self.target_radius is not None)


class Running(NamedTuple):
    """The estimation rows of the last look, and what the looks have proven until then."""

    rows: int
    p_lower: float
    radius: float


def at_look(question: Anytime, selection_counts: Counts, looks: Sequence[Counts]) -> Decision:
    """The decision at the last of the looks done so far.

    `looks` are cumulative estimation votes (K,) at the first looks of the schedule. END at n rows;
    before, REACHED where the looks prove the target, and HOPELESS where the two-sided rule with
    bounds on the other sides stays below it. Without a target CONTINUE until n.

    Raises ValueError for malformed counts, and for looks that are not those of the schedule.
    """
    label, votes = _checked(question, selection_counts, looks)
    if sum(votes[-1]) == question.n:
        return Decision.END
    if question.target_radius is None:
        return Decision.CONTINUE
    if _running(question, label, votes).radius >= question.target_radius:
        return Decision.REACHED
    if _largest_plausible(question, label, votes[-1]) < question.target_radius:
        return Decision.HOPELESS
    return Decision.CONTINUE


def bound(question: Anytime, selection_counts: Counts, looks: Sequence[Counts]) -> Running:
    """Proven so far by the looks, for the class with most selection votes; arguments as `at_look`.

    All of these statements hold together with probability at least 1 - alpha, whenever they are
    read.
    """
    return _running(question, *_checked(question, selection_counts, looks))


def certify_anytime(
    question: Anytime, selection_counts: Counts, looks: Sequence[Counts]
) -> Certificate:
    """The certificate after the last of the looks, whatever ended them; arguments as `at_look`.

    Before n rows `p_upper` is None, and `runner_up` the class with most other votes. On n rows the
    radius is the larger of the looks' and the two-sided rule's. `n` is the most rows allowed.

    Wrong with probability at most alpha, by the union bound. Raises ValueError as `at_look` does.
    """
    label, votes = _checked(question, selection_counts, looks)
    rows, p_lower, radius = _running(question, label, votes)
    p_upper = None
    if rows == question.n:
        last = bound_votes(
            label, votes[-1], question.sigma, question.shares, question.total_variation
        )
        p_lower, p_upper = max(p_lower, last.p_lower), last.p_upper
        radius = max(radius, last.radius)
    target = question.target_radius
    return Certificate(
        label=label if radius > 0.0 else None,
        runner_up=runner_up(label, votes[-1]),
        abstained=radius == 0.0,
        radius=radius,
        p_lower=p_lower,
        p_upper=p_upper,
        counts=votes[-1],
        n0=question.n0,
        n=question.n,
        alpha=question.alpha,
        sigma=question.sigma,
        method="anytime",
        target_radius=target,
        target_reached=None if target is None else radius >= target,
    )


def look_schedule(
    n: int,
    sigma: float,
    alpha: float,
    target_radius: float | None = None,
    total_variation: float = 0.0,
) -> tuple[int, ...]:
    """The estimation rows of every look, strictly ascending, the last equal to n.

    32, then 1.25 times as many, rounded up to 16; and the smallest number that can prove the
    target, rounded up to 16. Raises ValueError as `alpha_shares` does.
    """
    looks = {n}
    rows = FIRST_LOOK
    while rows < n:
        looks.add(rows)
        rows = _on_grid(rows + rows // 4)
    if target_radius is not None:
        level = alpha_shares("anytime", alpha, True)["looks"]
        provable = bisect_left(
            range(1, n + 1),
            target_radius,
            key=lambda m: certified_radius(
                lowered(anytime_lower(m, m, level), total_variation), sigma
            ),
        )
        looks.add(min(n, _on_grid(1 + provable)))
    return tuple(sorted(looks))


def largest_target(n: int, sigma: float, alpha: float, total_variation: float) -> float:
    """The largest target radius that n estimation rows can prove: all of them agreeing.

    Raises ValueError as `alpha_shares` does, and unless n >= 1.
    """
    shares = alpha_shares("anytime", alpha, True)
    return bound_votes(0, (n, 0), sigma, shares, total_variation).radius


def smallest_n_target(
    target_radius: float, sigma: float, alpha: float, total_variation: float
) -> int | None:
    """Fewest estimation rows that can prove the target radius; None where MOST_ROWS cannot.

    Raises ValueError as `alpha_shares` does.
    """
    rows = bisect_left(
        range(1, MOST_ROWS + 1),
        target_radius,
        key=lambda n: largest_target(n, sigma, alpha, total_variation),
    )
    return 1 + rows if rows < MOST_ROWS else None


def check_anytime(
    n0: int,
    n: int,
    sigma: float,
    alpha: float,
    target_radius: float | None = None,
    total_variation: float = 0.0,
) -> None:
    """Raises ValueError with field, value and limit where no votes could give the answer.

    Those of `check_certify`, more rows than MOST_ROWS, and a target radius that n unanimous rows
    could not prove.
    """
    check_certify(n0, n, sigma, alpha, "anytime", target_radius is not None)
    if n > MOST_ROWS:
        raise ValueError(f"n = {n}: the largest n of early stopping is {MOST_ROWS}")
    check_total_variation(total_variation)
    if target_radius is None:
        return
    if not (math.isfinite(target_radius) and target_radius > 0.0):
        raise ValueError(f"target_radius = {target_radius}: must be finite and greater than 0")
    largest = largest_target(n, sigma, alpha, total_variation)
    if target_radius > largest:
        needed = smallest_n_target(target_radius, sigma, alpha, total_variation)
        works = "no n works" if needed is None else f"the smallest n that works is {needed}"
        raise ValueError(
            f"target_radius = {target_radius} at n = {n}, sigma = {sigma} and alpha = {alpha} can "
            f"never be reached: the largest that can is {math.floor(largest * 1e6) / 1e6}; {works}"
        )


def _running(question: Anytime, label: int, votes: Sequence[tuple[int, ...]]) -> Running:
    level = question.shares["looks"]
    best = max(
        anytime_lower(look[label], rows, level)
        for look, rows in zip(votes, question.looks_schedule, strict=False)
    )
    p_lower = lowered(best, question.total_variation)
    return Running(sum(votes[-1]), p_lower, certified_radius(p_lower, question.sigma))


def _largest_plausible(question: Anytime, label: int, votes: tuple[int, ...]) -> float:
    """The radius that the two-sided rule would have if its bounds lay on their other sides."""
    rows, blur = sum(votes), question.total_variation
    most = raised(anytime_upper(votes[label], rows, HOPELESS_LEVEL), blur)
    least = lowered(anytime_lower(votes[runner_up(label, votes)], rows, HOPELESS_LEVEL), blur)
    return question.sigma / 2.0 * (quantile_up(most) - quantile_down(least))


def _checked(
    question: Anytime, selection_counts: Counts, looks: Sequence[Counts]
) -> tuple[int, list[tuple[int, ...]]]:
    """The selected class, and the looks' votes as Python integers."""
    check_total_variation(question.total_variation)
    selection = checked_counts("selection_counts", selection_counts)
    if sum(selection) != question.n0:
        raise ValueError(f"selection_counts sum to {sum(selection)}: must be n0 = {question.n0}")
    schedule = question.looks_schedule
    if not 1 <= len(looks) <= len(schedule):
        raise ValueError(f"looks has {len(looks)} looks: must be 1 to {len(schedule)}")
    votes = [checked_counts(f"looks[{i}]", look) for i, look in enumerate(looks)]
    for i, (look, rows) in enumerate(zip(votes, schedule, strict=False)):
        if len(look) != len(selection):
            raise ValueError(
                f"looks[{i}] has {len(look)} classes and selection_counts {len(selection)}: "
                "they must be equal"
            )
        if sum(look) != rows:
            raise ValueError(f"looks[{i}] sums to {sum(look)}: the schedule has {rows} rows there")
    return selection.index(max(selection)), votes


def _on_grid(rows: int) -> int:
    return -(-rows // LOOK_GRID) * LOOK_GRID
