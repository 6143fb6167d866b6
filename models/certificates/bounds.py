"""Confidence bounds on a probability from votes, each rounded to its safe side.

Clopper and Pearson (1934) for a number of rows fixed beforehand, and an e-process for a number that
the votes may decide (method.md 4b). Lower bounds never lie above their exact value, upper bounds
never below.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy.optimize import brentq
from scipy.special import betaincc, betaln, ndtri

from models.certificates.alpha import check_alpha
from models.certificates.limits import MOST_ROWS

MARGIN = 1e-12
"""Relative margin for the rounding errors of tails and quantiles.

About 300 times the largest error measured against 60-digit arithmetic for n <= 100,000 (betaincc
3e-15, ndtri 6e-16). It costs a radius less than sigma * 1e-11 there.
"""

# Of log_e, a row: 25 times the largest error found against 50-digit arithmetic, as
# tests/unit/models/test_bounds.py measures it.
_LOG_MARGIN = 1e-13

# Below it float64 tails are subnormal and no longer accurate.
_TAIL_MIN = 1e-300


def clopper_pearson_lower(k: int, n: int, alpha: float) -> float:
    """One-sided lower confidence bound on p after k successes in n rows (Clopper-Pearson 1934).

    The p at which P(Binomial(n, p) >= k) = alpha: 0 at k = 0, alpha^(1/n) at k = n; below the exact
    value by at most 2e-12, never above it. Raises ValueError unless 0 <= k <= n, n >= 1 and alpha
    is in [ALPHA_MIN, ALPHA_MAX].
    """
    check_alpha(alpha)
    _check_tally(k, n)
    if k == 0:
        return 0.0
    return max(0.0, math.nextafter(1.0 - clopper_pearson_upper(n - k, n, alpha), 0.0))


def clopper_pearson_upper(k: int, n: int, alpha: float) -> float:
    """One-sided upper confidence bound on p after k successes in n rows (Clopper-Pearson 1934).

    The p at which P(Binomial(n, p) <= k) = alpha: 1 - alpha^(1/n) at k = 0, 1 at k = n; above the
    exact value by at most 2e-12 of it, never below. Raises ValueError as `clopper_pearson_lower`.

    Found on the tail itself, not by SciPy's betainccinv. At alpha = 1e-9 and 999 of 100,000 that is
    off by 3e-11 (relative), on the unsound side. The tail is right to 3e-15. Both were measured
    with SciPy 1.17: docs/decisions/0002-clopper-pearson-by-root-finding.md.
    """
    check_alpha(alpha)
    _check_tally(k, n)
    if k == n:
        return 1.0
    if k == 0:
        exact = -math.expm1(math.log(alpha) / n)
    else:
        exact = brentq(
            lambda q: float(betaincc(k + 1, n - k, q)) - alpha,
            k / n,
            1.0,
            xtol=1e-300,
            rtol=1e-15,
            maxiter=1000,
        )
    return min(1.0, exact * (1.0 + MARGIN))


def log_e(k: int, n: int, p0: float) -> float:
    """Logarithm of the e-process against p <= p0, in (0, 1), after k successes in n rows.

    E_n = integral over (p0, 1) of q^k (1 - q)^(n - k) dpi(q) / (p0^k (1 - p0)^(n - k)), pi being
    Beta(1/2, 1/2) restricted to (p0, 1). Whatever p <= p0, E_n is a supermartingale: it reaches
    1/a at some n with probability at most a (Ville). The value lies below the exact one by at most
    2e-13 (n + 10), never above it; it is -inf where the tail underflows.
    """
    tail = float(betaincc(k + 0.5, n - k + 0.5, p0))
    if tail < _TAIL_MIN:
        return -math.inf
    # pi's mass above p0 is 2 angle / pi, and B(1/2, 1/2) is pi.
    angle = math.atan2(math.sqrt(1.0 - p0), math.sqrt(p0))
    against = k * math.log(p0) + (n - k) * math.log1p(-p0)
    value = float(betaln(k + 0.5, n - k + 0.5)) + math.log(tail / (2.0 * angle)) - against
    return value - _LOG_MARGIN * (n + 10)


@lru_cache(maxsize=4096)  # A look repeats the bounds of those before it.
def anytime_lower(k: int, n: int, level: float) -> float:
    """Lower bound on p that holds for all n together with probability at least 1 - level.

    inf{p0: E_n(p0) < 1/level}, 0 at k = 0. Below the exact value by at most 1e-10, never above it.
    Raises ValueError as `clopper_pearson_lower`, and for n above MOST_ROWS.

    E_n falls in p0 wherever it is at least 2, so 1/level is crossed once. Its logarithm's slope is
    h (1 - 1/E) - s, with h = pi's hazard rate and s the slope of log(p0^k (1 - p0)^(n - k)). Where
    h rises (p0 >= .28), comparing pi's tail to an exponential one gives 1 - 1/E <= s/h. Below,
    h <= .5/sqrt(p0 (1 - p0)) and s >= sqrt(n log(E) / (p0 (1 - p0))) > h.
    """
    check_alpha(level)
    _check_tally(k, n)
    if n > MOST_ROWS:
        raise ValueError(f"n = {n}: the largest n of an e-process is {MOST_ROWS}")
    if k == 0:
        return 0.0
    wanted = -math.log(level)
    highest = min(k / n, math.nextafter(1.0, 0.0))
    # E is at most 1 from k / n upwards.
    bound = brentq(lambda p0: log_e(k, n, p0) - wanted, 1e-300, highest, xtol=1e-300, maxiter=1000)
    step = math.ulp(bound)
    while log_e(k, n, bound) < wanted:
        bound -= step
        step *= 2.0
    return float(bound)


def anytime_upper(k: int, n: int, level: float) -> float:
    """Upper bound on p that holds for all n together: 1 - `anytime_lower` of the n - k others.

    Above the exact value by at most 1e-10, never below. Raises ValueError as `anytime_lower`.
    """
    return math.nextafter(1.0 - anytime_lower(n - k, n, level), 1.0)


def lowered(p_lower: float, total_variation: float) -> float:
    """The lower bound less the noise's total variation a row, rounded down, at least 0."""
    if total_variation == 0.0:
        return p_lower
    return max(0.0, math.nextafter(p_lower - total_variation, 0.0))


def raised(p_upper: float, total_variation: float) -> float:
    """The upper bound with the noise's total variation a row, rounded up, at most 1."""
    if total_variation == 0.0:
        return p_upper
    return min(1.0, math.nextafter(p_upper + total_variation, 1.0))


def quantile_down(p: float) -> float:
    """Standard normal quantile Phi^-1(p) of p in [0, 1], rounded down."""
    quantile = _quantile(p)
    return quantile * (1.0 - math.copysign(MARGIN, quantile))


def quantile_up(p: float) -> float:
    """Standard normal quantile Phi^-1(p) of p in [0, 1], rounded up."""
    quantile = _quantile(p)
    return quantile * (1.0 + math.copysign(MARGIN, quantile))


def _quantile(p: float) -> float:
    # 1 - p is exact in float64 from 1/2 upwards, and the lower tail keeps ndtri accurate.
    return float(ndtri(p)) if p <= 0.5 else -float(ndtri(1.0 - p))


def _check_tally(k: int, n: int) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"k = {k}, n = {n}: needs n >= 1 and 0 <= k <= n")
