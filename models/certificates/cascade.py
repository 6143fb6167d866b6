"""Certificates of a cascade over several noise levels: method.md 4c.

The cascade is one fixed classifier. With noise levels sigma_1 > ... > sigma_S, it answers the class
whose probability lies above 1/2 at the first level where there is one. "The largest radius of
several sigma" would certify only the classifier of that sigma, not the choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.certificates.alpha import ALPHA_MIN, check_alpha
from models.certificates.bounds import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    lowered,
    quantile_up,
    raised,
)
from models.certificates.counts import Counts, checked_counts, checked_pair, runner_up
from models.certificates.rules import (
    Certificate,
    certified_radius,
    check_rows,
    check_total_variation,
)

MIN_STAGES, MAX_STAGES = 2, 4


@dataclass(frozen=True, slots=True)
class Cascade:
    """A question at several noise levels, as fixed before any row was drawn.

    `sigmas` descend; `total_variations` has one row's at each of them. `n0` and `n` are the rows of
    every stage.
    """

    sigmas: tuple[float, ...]
    alpha: float
    n0: int
    n: int
    total_variations: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StageBounds:
    """One stage's bound, and the radius within which the stage keeps its part of the answer.

    A passed stage has `p_upper`, of every class but the last stage's. The last one, which answers
    or abstains, has `p_lower` of its class.
    """

    p_lower: float | None
    p_upper: float | None
    radius: float


@dataclass(frozen=True, slots=True)
class CascadeCertificate:
    """The certificate of a cascade, and the bounds of its stages up to the last one read.

    `stage` is the index of the stage that answered, None on abstention. The certificate's `sigma`,
    `counts` and `p_lower` are the last stage's; its radius is the least of the stages'.
    """

    certificate: Certificate
    stage: int | None
    bounds: tuple[StageBounds, ...]


def certify_cascade(
    question: Cascade, stages: Sequence[tuple[Counts, Counts]]
) -> CascadeCertificate:
    """The cascade's certificate from (selection, estimation) votes (K,) of its stages in order.

    The first stage that is not passed answers its class with most selection votes, if that class's
    bound lies above 1/2. Otherwise the cascade abstains; it does not go on. Wrong with probability
    at most alpha: given the rows of the later stages the answer is fixed, and a passed stage bounds
    one class, the strongest other one.

    Stages after the one that answers or abstains are not read. Raises ValueError as `check_cascade`
    does, for malformed counts, and where stages are missing.
    """
    check_cascade(question.n0, question.n, question.sigmas, question.alpha)
    for blur in question.total_variations:
        check_total_variation(blur)
    passed: list[tuple[int, ...]] = []
    for selection_counts, estimation_counts in stages[: len(question.sigmas)]:
        selection, votes = checked_pair(selection_counts, estimation_counts)
        if (sum(selection), sum(votes)) != (question.n0, question.n):
            raise ValueError(
                f"stages[{len(passed)}] sums to {sum(selection)} and {sum(votes)}: "
                f"must be n0 = {question.n0} and n = {question.n}"
            )
        if len(passed) + 1 == len(question.sigmas) or not is_passed(question, len(passed), votes):
            return _certificate(question, selection.index(max(selection)), passed, votes)
        passed.append(votes)
    raise ValueError(f"stages has {len(stages)} stages, all passed: the next is missing")


def is_passed(question: Cascade, stage: int, estimation_counts: Counts) -> bool:
    """Whether no class can lie above 1/2 at this stage (index), so that the next one is read."""
    votes = checked_counts("estimation_counts", estimation_counts)
    return _upper(question, stage, max(votes)) <= 0.5


def stage_shares(alpha: float, stages: int) -> dict[str, float]:
    """The parts of alpha by what they are spent on: two sides a stage, all equal.

    They sum to at most alpha. Raises ValueError for an alpha outside [ALPHA_MIN, ALPHA_MAX], and
    for a share below ALPHA_MIN.
    """
    check_alpha(alpha)
    share = math.nextafter(alpha / (2 * stages), 0.0)
    if share < ALPHA_MIN:
        raise ValueError(
            f"alpha = {alpha}: the share of a stage's side is {share:.3g}, "
            f"which must be at least {ALPHA_MIN}"
        )
    return {f"stage_{i}_{side}": share for i in range(stages) for side in ("label", "others")}


def check_cascade(n0: int, n: int, sigmas: Sequence[float], alpha: float) -> None:
    """Raises ValueError with field, value and limit for a cascade that could only abstain."""
    if not MIN_STAGES <= len(sigmas) <= MAX_STAGES:
        raise ValueError(f"sigma = {[*sigmas]}: must be {MIN_STAGES} to {MAX_STAGES} values")
    if any(this <= following for this, following in pairwise(sigmas)):
        raise ValueError(f"sigma = {[*sigmas]}: must descend")
    share = min(stage_shares(alpha, len(sigmas)).values())
    for sigma in sigmas:
        check_rows(n0, n, sigma, alpha, share)


def _certificate(
    question: Cascade, label: int, passed: Sequence[tuple[int, ...]], votes: tuple[int, ...]
) -> CascadeCertificate:
    stage, share = len(passed), min(stage_shares(question.alpha, len(question.sigmas)).values())
    bounds = []
    for i, earlier in enumerate(passed):
        p_upper = _upper(question, i, earlier[runner_up(label, earlier)])
        radius = max(0.0, -question.sigmas[i] * quantile_up(p_upper))
        bounds.append(StageBounds(None, p_upper, radius))
    blur, sigma = question.total_variations[stage], question.sigmas[stage]
    p_lower = lowered(clopper_pearson_lower(votes[label], question.n, share), blur)
    bounds.append(StageBounds(p_lower, None, certified_radius(p_lower, sigma)))
    radius = min(bound.radius for bound in bounds)
    certificate = Certificate(
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
    )
    return CascadeCertificate(certificate, stage if radius > 0.0 else None, tuple(bounds))


def _upper(question: Cascade, stage: int, count: int) -> float:
    """Upper bound on the probability of a class with this many of the stage's n votes."""
    share = min(stage_shares(question.alpha, len(question.sigmas)).values())
    p_upper = clopper_pearson_upper(count, question.n, share)
    return raised(p_upper, question.total_variations[stage])
