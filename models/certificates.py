"""Certificates from vote counts: PREDICT and CERTIFY of randomized smoothing.

Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing" (ICML
2019), section 3.2. Radii are l2 in the [0, 1] pixel scale. Every rounding here goes down: a bound
or a radius may lie below its exact value, never above it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincc, ndtri

Counts = Sequence[int] | NDArray[np.integer]

ALPHA_MIN = 1e-100
"""Smallest alpha accepted: float64 tails are accurate down to here, subnormal ones are not."""

ALPHA_MAX = 0.5
"""Largest alpha accepted: above 1/2 the statement is more likely false than true."""

# Relative. About 300 times the largest error measured against 60-digit arithmetic for n <= 100,000
# (betaincc 3e-15, ndtri 6e-16); it costs a radius less than sigma * 1e-11 there.
_MARGIN = 1e-12


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the votes of n noise rows prove about one image.

    `label` is a class index, None on abstention. `radius` (l2, [0, 1] pixel scale) and `p_lower`
    are None for PREDICT; `radius` is 0.0 where CERTIFY abstains. `counts` are the estimation votes
    by class (for PREDICT: the votes) and sum to `n`. `n0` is 0 and `sigma` None for PREDICT.
    """

    label: int | None
    abstained: bool
    radius: float | None
    p_lower: float | None
    counts: tuple[int, ...]
    n0: int
    n: int
    alpha: float
    sigma: float | None
    method: str


def certify(
    selection_counts: Counts,
    estimation_counts: Counts,
    sigma: float,
    alpha: float,
    *,
    total_variation: float = 0.0,
) -> Certificate:
    """CERTIFY: the class with most selection votes (K,), its radius from estimation votes (K,).

    Equal selection votes choose the lowest index. With probability at least 1 - alpha over the
    noise, no perturbation shorter than the radius changes the smoothed classifier's label.
    `total_variation` bounds, for one row, the distance between the noise drawn and the ideal noise.
    It is subtracted from p_lower.

    Raises ValueError as `check_certify` does, for malformed counts, and for a total variation
    outside [0, 1/2).
    """
    selection = _checked("selection_counts", selection_counts)
    estimation = _checked("estimation_counts", estimation_counts)
    if len(selection) != len(estimation):
        raise ValueError(
            f"selection_counts has {len(selection)} classes and estimation_counts "
            f"{len(estimation)}: they must be equal"
        )
    n0, n = sum(selection), sum(estimation)
    check_certify(n0, n, sigma, alpha)
    if not 0.0 <= total_variation < 0.5:
        raise ValueError(f"total_variation = {total_variation}: must be in [0, 0.5)")

    label = selection.index(max(selection))
    p_lower = clopper_pearson_lower(estimation[label], n, alpha)
    if total_variation > 0.0:
        p_lower = max(0.0, math.nextafter(p_lower - total_variation, 0.0))
    abstained = p_lower <= 0.5
    return Certificate(
        label=None if abstained else label,
        abstained=abstained,
        radius=certified_radius(p_lower, sigma),
        p_lower=p_lower,
        counts=estimation,
        n0=n0,
        n=n,
        alpha=alpha,
        sigma=sigma,
        method="cohen",
    )


def predict(counts: Counts, alpha: float, *, total_variation: float = 0.0) -> Certificate:
    """PREDICT: the class with most votes (K,), unless the second could be as probable.

    Abstains where the two-sided binomial test of the top count against the top two at 1/2 has a
    p-value above alpha - n `total_variation`. Here n rows as drawn differ from ideal ones by at
    most n `total_variation` (method.md 4a). Other classes do not enter, and equal top counts always
    abstain.

    Raises ValueError as `check_predict` does, and for malformed counts.
    """
    votes = _checked("counts", counts)
    n = sum(votes)
    check_predict(n, alpha, total_variation)
    second, top = sorted(votes)[-2:]
    abstained = _two_sided_p_value(top, second) > _spendable(alpha, n, total_variation)
    return Certificate(
        label=None if abstained else votes.index(top),
        abstained=abstained,
        radius=None,
        p_lower=None,
        counts=votes,
        n0=0,
        n=n,
        alpha=alpha,
        sigma=None,
        method="binomial",
    )


def clopper_pearson_lower(k: int, n: int, alpha: float) -> float:
    """One-sided lower confidence bound on p after k successes in n rows (Clopper-Pearson 1934).

    The p at which P(Binomial(n, p) >= k) = alpha: 0 at k = 0, alpha^(1/n) at k = n; below the exact
    value by at most 2e-12, never above it. Raises ValueError unless 0 <= k <= n, n >= 1 and alpha
    is in [ALPHA_MIN, ALPHA_MAX].
    """
    _check_alpha(alpha)
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k = {k}, n = {n}: needs n >= 1 and 0 <= k <= n")
    if k == 0:
        return 0.0
    miss = -math.expm1(math.log(alpha) / n) if k == n else _miss_probability(n - k, n, alpha)
    return max(0.0, math.nextafter(1.0 - miss * (1.0 + _MARGIN), 0.0))


def certified_radius(p_lower: float, sigma: float) -> float:
    """The l2 radius sigma * Phi^-1(p_lower), 0.0 for p_lower <= 1/2 (Cohen et al., theorem 1).

    Never above the exact value for these two floats, below it by at most 2e-12 of it.
    """
    if p_lower <= 0.5:
        return 0.0
    # 1 - p_lower is exact in float64 from 1/2 upwards, and the lower tail keeps ndtri accurate.
    quantile = -float(ndtri(1.0 - p_lower))
    return sigma * quantile * (1.0 - _MARGIN)


def smallest_n_certify(alpha: float) -> int:
    """Fewest estimation rows with which CERTIFY can return a label: alpha^(1/n) > 1/2."""
    return next(n for n in itertools.count(1) if clopper_pearson_lower(n, n, alpha) > 0.5)


def smallest_n_predict(alpha: float) -> int:
    """Fewest rows of ideal noise with which PREDICT can return a label: 2^(1-n) <= alpha."""
    _check_alpha(alpha)
    return next(n for n in itertools.count(1) if _two_sided_p_value(n, 0) <= alpha)


def check_certify(n0: int, n: int, sigma: float, alpha: float) -> None:
    """Raises ValueError with field, value and limit where CERTIFY could only abstain."""
    _check_alpha(alpha)
    if not (math.isfinite(sigma) and sigma > 0.0):
        raise ValueError(f"sigma = {sigma}: must be finite and greater than 0")
    if n0 < 1:
        raise ValueError(f"n0 = {n0}: the smallest n0 that works is 1")
    _check_rows(n, alpha, smallest_n_certify(alpha))


def check_predict(n: int, alpha: float, total_variation: float = 0.0) -> None:
    """Raises ValueError with field, value and limit where PREDICT could only abstain.

    `total_variation` is one row's, between the noise as drawn and the ideal. The n rows spend n of
    it from alpha.
    """
    _check_alpha(alpha)
    _check_rows(n, alpha, smallest_n_predict(alpha))
    least = _two_sided_p_value(n, 0) + n * total_variation
    if _two_sided_p_value(n, 0) > _spendable(alpha, n, total_variation):
        raise ValueError(
            f"alpha = {alpha} with n = {n} can only ever abstain, for the noise as drawn is not "
            f"ideal: the smallest alpha that works is about {least:.3g}"
        )


def average_certified_radius(radii: ArrayLike, correct: ArrayLike) -> float:
    """Mean over all N images of the radius where correct and 0 elsewhere.

    `radii` (N,) are floats, 0 for an abstention; `correct` (N,) are booleans, False for an
    abstention. Raises ValueError for other shapes, no images, or a radius that is negative or not
    finite.
    """
    radius, right = _checked_results(radii, correct)
    return float(np.mean(radius * right))


def certified_accuracy(radii: ArrayLike, correct: ArrayLike, epsilon: float) -> float:
    """Share in [0, 1] of all N images that are correct with a radius of at least epsilon.

    Arguments as for `average_certified_radius`. An abstention does not count at epsilon 0, because
    its `correct` is False. Raises ValueError as there, or where epsilon is not in [0, inf).
    """
    if not 0.0 <= epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon}: must be finite and at least 0")
    radius, right = _checked_results(radii, correct)
    return float(np.mean(right & (radius >= epsilon)))


def _miss_probability(misses: int, n: int, alpha: float) -> float:
    """The q with P(Binomial(n, q) <= misses) = alpha, for 0 < misses < n.

    Found on the tail itself, not by SciPy's betainccinv. At alpha = 1e-9 and 999 misses of 100,000
    that is off by 3e-11 (relative), on the unsound side. The tail is right to 3e-15. Both were
    measured with SciPy 1.17: docs/decisions/0002-clopper-pearson-by-root-finding.md.
    """
    root = brentq(
        lambda q: float(betaincc(misses + 1, n - misses, q)) - alpha,
        misses / n,
        1.0,
        xtol=1e-300,
        rtol=1e-15,
        maxiter=1000,
    )
    return float(root)


def _two_sided_p_value(top: int, second: int) -> float:
    """P-value of top against top + second at 1/2, rounded up unless exact; needs top >= second."""
    if second == 0:
        return math.ldexp(1.0, 1 - top)
    return 2.0 * float(betainc(top, second + 1, 0.5)) * (1.0 + _MARGIN)


def _spendable(alpha: float, n: int, total_variation: float) -> float:
    """The part of alpha left for the votes of n rows of non-ideal noise, rounded down."""
    if total_variation == 0.0:
        return alpha
    return math.nextafter(alpha - n * total_variation * (1.0 + _MARGIN), -math.inf)


def _check_alpha(alpha: float) -> None:
    if not ALPHA_MIN <= alpha <= ALPHA_MAX:
        raise ValueError(f"alpha = {alpha}: must be in [{ALPHA_MIN}, {ALPHA_MAX}]")


def _check_rows(n: int, alpha: float, smallest: int) -> None:
    if n < smallest:
        raise ValueError(
            f"n = {n} at alpha = {alpha} can only ever abstain: "
            f"the smallest n that works is {smallest}"
        )


def _checked(name: str, counts: Counts) -> tuple[int, ...]:
    """The counts as Python integers; ValueError unless two or more non-negative integers."""
    try:
        checked = tuple(operator.index(count) for count in counts)
    except TypeError as error:
        raise ValueError(f"{name} = {counts}: must be integers by class") from error
    if len(checked) < 2:
        raise ValueError(f"{name} has {len(checked)} classes: the smallest number is 2")
    if min(checked) < 0:
        raise ValueError(f"{name} holds {min(checked)}: the smallest count is 0")
    return checked


def _checked_results(
    radii: ArrayLike, correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    radius = np.asarray(radii, dtype=np.float64)
    right = np.asarray(correct, dtype=np.bool_)
    if radius.ndim != 1 or radius.shape != right.shape or radius.size == 0:
        raise ValueError(
            f"radii {radius.shape} and correct {right.shape}: must both be (N,) with N >= 1"
        )
    if not (np.isfinite(radius).all() and (radius >= 0.0).all()):
        raise ValueError("radii: every radius must be finite and at least 0")
    return radius, right
