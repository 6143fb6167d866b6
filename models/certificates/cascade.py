"""Certificates of a cascade over several noise levels: method.md 4c.

The cascade is one fixed classifier. With noise levels sigma_1 > ... > sigma_S, it answers the class
whose probability lies above 1/2 at the first level where there is one. "The largest radius of
several sigma" would certify only the classifier of that sigma, not the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.certificates.alpha import stage_shares
from models.certificates.bounds import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    lowered,
    quantile_up,
    raised,
)
from models.certificates.counts import Counts, checked_counts, checked_pair, runner_up
from models.certificates.limits import MAX_STAGES, MIN_STAGES
from models.certificates.rules import (
    Certificate,
    StageBounds,
    certified_radius,
    check_rows,
    check_total_variation,
    smallest_n,
)


@dataclass(frozen=True, slots=True)
class Cascade:
    """A question at several noise levels, as fixed before any row was drawn.

    `sigmas` descend. `n0` and `n` are the rows of every stage. `total_variation` is that of a row
    at the largest sigma, which bounds the other stages' too.
    """

    sigmas: tuple[float, ...]
    alpha: float
    n0: int
    n: int
    total_variation: float = 0.0


def certify_cascade(
    question: Cascade, selection_counts: Counts, stages: Sequence[Counts]
) -> Certificate:
    """The cascade's certificate from the estimation votes (K,) of the stages that were read.

    They are the stages up to the first one that is not passed; `selection_counts` (K,) are that
    one's. It answers the class with most selection votes, if that class's bound lies above 1/2.
    Otherwise the cascade abstains; it does not go on. Wrong with probability at most alpha: given
    the rows of the later stages the answer is fixed, and a passed stage bounds one class, the
    strongest other one.

    Raises ValueError as `check_cascade` does, for malformed counts, and where other stages were
    read.
    """
    check_cascade(question.n0, question.n, question.sigmas, question.alpha)
    check_total_variation(question.total_variation)
    if not 1 <= len(stages) <= len(question.sigmas):
        raise ValueError(f"{len(stages)} stages were read: must be 1 to {len(question.sigmas)}")
    read: list[tuple[int, ...]] = []
    for counts in stages:
        selection, votes = checked_pair(selection_counts, counts)
        if (sum(selection), sum(votes)) != (question.n0, question.n):
            raise ValueError(
                f"stage {len(read) + 1} has {sum(selection)} and {sum(votes)} votes: "
                f"must have n0 = {question.n0} and n = {question.n}"
            )
        read.append(votes)
    for number, votes in enumerate(read, 1):
        is_last = number == len(read)
        if number < len(question.sigmas) and is_passed(question, votes) is is_last:
            what = "passed, and the next is missing" if is_last else "not passed, so it is the last"
            raise ValueError(f"stage {number} is {what}")
    return _certificate(question, selection.index(max(selection)), read[:-1], read[-1])


def is_passed(question: Cascade, estimation_counts: Counts) -> bool:
    """Whether no class can lie above 1/2 at a stage with these votes (K,): the next one is read."""
    votes = checked_counts("estimation_counts", estimation_counts)
    return _upper(question, max(votes)) <= 0.5


def check_cascade(n0: int, n: int, sigmas: Sequence[float], alpha: float) -> None:
    """Raises ValueError with field, value and limit for a cascade that could only abstain."""
    if not MIN_STAGES <= len(sigmas) <= MAX_STAGES:
        raise ValueError(f"sigma has {len(sigmas)} values: must be {MIN_STAGES} to {MAX_STAGES}")
    if any(this <= following for this, following in pairwise(sigmas)):
        raise ValueError(f"sigma = {[*sigmas]}: must descend")
    share = min(stage_shares(alpha, len(sigmas)).values())
    for sigma in sigmas:
        check_rows(n0, n, sigma, alpha, share)


def smallest_n_cascade(alpha: float, stages: int) -> int:
    """Fewest estimation rows of each of a cascade's `stages` (their number) that can answer."""
    return smallest_n(min(stage_shares(alpha, stages).values()))


def _certificate(
    question: Cascade, label: int, passed: Sequence[tuple[int, ...]], votes: tuple[int, ...]
) -> Certificate:
    sigma = question.sigmas[len(passed)]
    share = min(stage_shares(question.alpha, len(question.sigmas)).values())
    bounds = []
    for i, earlier in enumerate(passed):
        p_upper = _upper(question, earlier[runner_up(label, earlier)])
        radius = max(0.0, -question.sigmas[i] * quantile_up(p_upper))
        bounds.append(StageBounds(question.sigmas[i], None, p_upper, radius))
    p_lower = clopper_pearson_lower(votes[label], question.n, share)
    p_lower = lowered(p_lower, question.total_variation)
    bounds.append(StageBounds(sigma, p_lower, None, certified_radius(p_lower, sigma)))
    radius = min(bound.radius for bound in bounds)
    return Certificate(
        label=label if radius > 0.0 else None,
        runner_up=None,
        abstained=radius == 0.0,
        radius=radius,
        p_lower=p_lower,
        p_upper=None,
        counts=votes,
        n0=question.n0,
        n=question.n,
        alpha=question.alpha,
        sigma=sigma,
        method="cascade",
        stages=tuple(bounds),
    )


def _upper(question: Cascade, count: int) -> float:
    """Upper bound on the probability of a class with this many of a stage's n votes."""
    share = min(stage_shares(question.alpha, len(question.sigmas)).values())
    p_upper = clopper_pearson_upper(count, question.n, share)
    return raised(p_upper, question.total_variation)
