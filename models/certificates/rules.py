"""Certificates from vote counts: PREDICT and CERTIFY of randomized smoothing.

Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing" (ICML
2019), theorem 1 and section 3.2; method.md 4a bounds its runner-up. Radii are l2 in the [0, 1]
pixel scale. Every rounding is to the safe side: a lower bound or a radius never lies above its
exact value, an upper bound never below.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from scipy.special import betainc

from models.certificates.alpha import alpha_shares, check_alpha
from models.certificates.bounds import (
    MARGIN,
    clopper_pearson_lower,
    clopper_pearson_upper,
    lowered,
    quantile_down,
    quantile_up,
    raised,
)
from models.certificates.counts import Counts, checked_counts, checked_pair, runner_up


@dataclass(frozen=True, slots=True)
class StageBounds:
    """A cascade's bound at one noise level, and the radius within which the level's part holds.

    A passed stage has `p_upper`, of every class but the answer. The last stage read, which answers
    or abstains, has `p_lower` of its class.
    """

    sigma: float
    p_lower: float | None
    p_upper: float | None
    radius: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the votes of at most n noise rows prove about one image.

    `label` is a class index, None on abstention. `runner_up` is the other class with most votes,
    None for "cohen" and "binomial". `radius` (l2, [0, 1] pixel scale) and `p_lower` are None for
    PREDICT; `radius` is 0.0 where CERTIFY abstains. `p_upper` bounds every other class, and is None
    where nothing but `p_lower` does. `counts` are the estimation votes by class (for PREDICT: the
    votes); they sum to `n`, or to less after early stopping. `n0` is 0 and `sigma` None for
    PREDICT. `target_reached` is None without a `target_radius`.

    `stages` are those that a cascade has read, else empty. `sigma`, `counts` and `p_lower` are then
    the last one's, and `n0` and `n` the rows of each.
    """

    label: int | None
    runner_up: int | None
    abstained: bool
    radius: float | None
    p_lower: float | None
    p_upper: float | None
    counts: tuple[int, ...]
    n0: int
    n: int
    alpha: float
    sigma: float | None
    method: str
    target_radius: float | None = None
    target_reached: bool | None = None
    stages: tuple[StageBounds, ...] = ()


class Bounds(NamedTuple):
    """Bounds on the chosen class and, unless None, on every other one; the radius they prove."""

    p_lower: float
    p_upper: float | None
    radius: float


def certify(
    selection_counts: Counts,
    estimation_counts: Counts,
    sigma: float,
    alpha: float,
    *,
    method: str = "two-sided",
    total_variation: float = 0.0,
) -> Certificate:
    """CERTIFY: the class with most selection votes (K,), its radius from estimation votes (K,).

    Equal selection votes choose the lowest index. With probability at least 1 - alpha over the
    noise, no perturbation shorter than the radius changes the smoothed classifier's label.
    `method` "two-sided" bounds the runner-up too; "cohen" is the published rule without.
    `total_variation` bounds, for one row, the distance between the noise drawn and the ideal noise.
    It is subtracted from p_lower and added to p_upper.

    Raises ValueError as `check_certify` does, for malformed counts, and for a total variation
    outside [0, 1/2).
    """
    selection, estimation = checked_pair(selection_counts, estimation_counts)
    n0, n = sum(selection), sum(estimation)
    check_certify(n0, n, sigma, alpha, method)
    check_total_variation(total_variation)

    label = selection.index(max(selection))
    shares = alpha_shares(method, alpha)
    p_lower, p_upper, radius = bound_votes(label, estimation, sigma, shares, total_variation)
    return Certificate(
        label=label if radius > 0.0 else None,
        runner_up=None if p_upper is None else runner_up(label, estimation),
        abstained=radius == 0.0,
        radius=radius,
        p_lower=p_lower,
        p_upper=p_upper,
        counts=estimation,
        n0=n0,
        n=n,
        alpha=alpha,
        sigma=sigma,
        method=method,
    )


def bound_votes(
    label: int,
    votes: tuple[int, ...],
    sigma: float,
    shares: dict[str, float],
    total_variation: float,
) -> Bounds:
    """The bounds that the estimation votes (K,) give for `label`, and their radius.

    p_lower at the level `shares["label"]`; p_upper at `shares["runner_up"]`, where it is given, of
    the largest other count. No union over the classes is paid: the true runner-up is one fixed
    class, its bound does not lie above that of a larger count, and 1 - p_lower bounds it as well
    (method.md 4a).
    """
    n = sum(votes)
    p_lower = lowered(clopper_pearson_lower(votes[label], n, shares["label"]), total_variation)
    if "runner_up" not in shares:
        return Bounds(p_lower, None, certified_radius(p_lower, sigma))
    most = votes[runner_up(label, votes)]
    p_upper = raised(clopper_pearson_upper(most, n, shares["runner_up"]), total_variation)
    # Exact from 1/2 upwards; below, the class is not certified.
    p_upper = min(p_upper, math.nextafter(1.0 - p_lower, 1.0) if p_lower < 0.5 else 1.0 - p_lower)
    return Bounds(p_lower, p_upper, certified_radius(p_lower, sigma, p_upper))


def certified_radius(p_lower: float, sigma: float, p_upper: float | None = None) -> float:
    """The l2 radius sigma/2 * (Phi^-1(p_lower) - Phi^-1(p_upper)) (Cohen et al., theorem 1).

    Without a p_upper it is 1 - p_lower. 0.0 unless p_lower lies above p_upper. Never above the
    exact value for these floats, below it by at most 2e-12 of the quantiles.
    """
    if p_upper is None:
        return sigma * quantile_down(p_lower) if p_lower > 0.5 else 0.0
    if p_lower <= p_upper:
        return 0.0
    return max(0.0, sigma / 2.0 * (quantile_down(p_lower) - quantile_up(p_upper)))


def predict(counts: Counts, alpha: float, *, total_variation: float = 0.0) -> Certificate:
    """PREDICT: the class with most votes (K,), unless the second could be as probable.

    Abstains where the two-sided binomial test of the top count against the top two at 1/2 has a
    p-value above alpha - n `total_variation`. Here n rows as drawn differ from ideal ones by at
    most n `total_variation` (method.md 4a). Other classes do not enter, and equal top counts always
    abstain.

    Raises ValueError as `check_predict` does, and for malformed counts.
    """
    votes = checked_counts("counts", counts)
    n = sum(votes)
    check_predict(n, alpha, total_variation)
    second, top = sorted(votes)[-2:]
    abstained = _two_sided_p_value(top, second) > _spendable(alpha, n, total_variation)
    return Certificate(
        label=None if abstained else votes.index(top),
        runner_up=None,
        abstained=abstained,
        radius=None,
        p_lower=None,
        p_upper=None,
        counts=votes,
        n0=0,
        n=n,
        alpha=alpha,
        sigma=None,
        method="binomial",
    )


def smallest_n_certify(alpha: float, method: str = "two-sided", with_target: bool = False) -> int:
    """Fewest estimation rows that can return a label: share^(1/n) > 1/2, share the label's."""
    return smallest_n(alpha_shares(method, alpha, with_target)["label"])


def smallest_n(share: float) -> int:
    """Fewest rows that can prove a label at the level `share`: share^(1/n) > 1/2."""
    return next(n for n in itertools.count(1) if clopper_pearson_lower(n, n, share) > 0.5)


def smallest_n_predict(alpha: float) -> int:
    """Fewest rows of ideal noise with which PREDICT can return a label: 2^(1-n) <= alpha."""
    check_alpha(alpha)
    return next(n for n in itertools.count(1) if _two_sided_p_value(n, 0) <= alpha)


def check_certify(
    n0: int,
    n: int,
    sigma: float,
    alpha: float,
    method: str = "two-sided",
    with_target: bool = False,
) -> None:
    """Raises ValueError with field, value and limit where CERTIFY could only abstain."""
    check_rows(n0, n, sigma, alpha, alpha_shares(method, alpha, with_target)["label"])


def check_rows(n0: int, n: int, sigma: float, alpha: float, share: float) -> None:
    """Raises ValueError where `share`, the part of alpha for the label, could only abstain."""
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"sigma = {sigma}: must be finite and greater than 0")
    if n0 < 1:
        raise ValueError(f"n0 = {n0}: the smallest n0 that works is 1")
    _check_n(n, alpha, smallest_n(share))


def check_predict(n: int, alpha: float, total_variation: float = 0.0) -> None:
    """Raises ValueError with field, value and limit where PREDICT could only abstain.

    `total_variation` is one row's, between the noise as drawn and the ideal. The n rows spend n of
    it from alpha.
    """
    check_alpha(alpha)
    _check_n(n, alpha, smallest_n_predict(alpha))
    least = _two_sided_p_value(n, 0) + n * total_variation
    if _two_sided_p_value(n, 0) > _spendable(alpha, n, total_variation):
        raise ValueError(
            f"alpha = {alpha} with n = {n} can only ever abstain, for the noise as drawn is not "
            f"ideal: the smallest alpha that works is about {least:.3g}"
        )


def check_total_variation(total_variation: float) -> None:
    """Raises ValueError unless the total variation a row is in [0, 1/2)."""
    if not 0.0 <= total_variation < 0.5:
        raise ValueError(f"total_variation = {total_variation}: must be in [0, 0.5)")


def _two_sided_p_value(top: int, second: int) -> float:
    """P-value of top against top + second at 1/2, rounded up unless exact; needs top >= second."""
    if second == 0:
        return math.ldexp(1.0, 1 - top)
    return 2.0 * float(betainc(top, second + 1, 0.5)) * (1.0 + MARGIN)


def _spendable(alpha: float, n: int, total_variation: float) -> float:
    """The part of alpha left for the votes of n rows of non-ideal noise, rounded down."""
    if total_variation == 0.0:
        return alpha
    return math.nextafter(alpha - n * total_variation * (1.0 + MARGIN), -math.inf)


def _check_n(n: int, alpha: float, smallest: int) -> None:
    if n < smallest:
        raise ValueError(
            f"n = {n} at alpha = {alpha} can only ever abstain: "
            f"the smallest n that works is {smallest}"
        )
