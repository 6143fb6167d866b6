"""Writes vectors.json: exact certificates, independent of models/certificates/rules.py.

Run `python tests/data/certificates/make_vectors.py` from the repository root (needs mpmath; half a
minute). CERTIFY: p_lower solves P(Binomial(n, p) >= k) = alpha by Newton's method on a finite
sum of binomial probabilities in 80-digit arithmetic, the radius is sigma * Phi^-1(p_lower -
total_variation), or 0 where that is at most 1/2; both are stored to 50 digits. PREDICT: the
two-sided p-value is an exact fraction. Settings that can only ever abstain are left out. Every
float stands for the exact value of its binary form.
"""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

from mpmath import mp, mpf

mp.dps = 80
FIXED_POINT_BITS = 280
ROWS = (10, 11, 37, 100, 1000, 10_000, 100_000)
ALPHAS = (1e-9, 0.001, 0.05, 0.5)
SIGMAS = (0.02, 0.12, 0.25, 0.5, 1.0, 4.0)
TOTAL_VARIATIONS = (0.0, 0.0, 1e-12, 0.0, 1e-6, 0.01, 0.0)


def fewest_votes(n: int, tail: Fraction) -> int:
    """The smallest k with P(Binomial(n, 1/2) >= k) <= tail (n + 1 where there is none)."""
    room = tail * 2**n
    k, term, total = n + 1, 1, 0
    while total + term <= room:
        total += term
        k -= 1
        term = term * k // (n - k + 1)
    return k


def tail_and_slope(q: mpf, n: int, misses: int) -> tuple[mpf, mpf]:
    """P(Binomial(n, q) <= misses) and its derivative by q, for q >= misses / n."""
    k = n - misses
    lead = mp.exp(
        mp.loggamma(n + 1)
        - mp.loggamma(misses + 1)
        - mp.loggamma(k + 1)
        + misses * mp.log(q)
        + k * mp.log(1 - q)
    )
    one = 1 << FIXED_POINT_BITS
    ratio = int((1 - q) / q * one)
    term, total = one, one
    for j in range(misses, 0, -1):
        term = (term * ratio >> FIXED_POINT_BITS) * j // (n - j + 1)
        if term == 0:
            break
        total += term
    return lead * total / one, -lead * k / (1 - q)


def lower_bound(k: int, n: int, alpha: float) -> mpf:
    """The Clopper-Pearson bound; Newton on the concave log-tail, started at a proven bound."""
    if k == 0:
        return mpf(0)
    hoeffding = mpf(n - k) / n + mp.sqrt(-mp.log(alpha) / (2 * n))
    union = 1 - mpf(alpha) ** (mpf(1) / k) / n
    q = min(hoeffding, union)
    while True:
        tail, slope = tail_and_slope(q, n, n - k)
        step = (mp.log(tail) - mp.log(alpha)) * tail / slope
        q -= step
        if abs(step) < mpf(10) ** -53 * min(q, 1 - q):
            return 1 - q


def certify_vectors() -> list[dict[str, object]]:
    settings = itertools.cycle(itertools.product(SIGMAS, TOTAL_VARIATIONS))
    vectors = []
    for n, alpha in itertools.product(ROWS, ALPHAS):
        border = fewest_votes(n, Fraction(alpha))
        if border > n:
            continue
        shares = {round(n * share) for share in (0.3, 0.6, 0.8, 0.95)}
        misses = {n - m for m in (0, 1, 2, 3, 10, 99, 999) if m < n // 2}
        borders = {k for k in (border - 1, border, border + 1) if k <= n}
        for k in sorted({0, 1} | shares | misses | borders):
            sigma, total_variation = next(settings)
            bound = lower_bound(k, n, alpha)
            p_lower = max(mpf(0), bound - mpf(total_variation))
            half = mpf(1) / 2
            radius = sigma * mp.sqrt(2) * mp.erfinv(2 * p_lower - 1) if p_lower > half else mpf(0)
            vectors.append(
                {
                    "k": k,
                    "n": n,
                    "alpha": alpha,
                    "sigma": sigma,
                    "total_variation": total_variation,
                    "bound": mp.nstr(bound, 50),
                    "p_lower": mp.nstr(p_lower, 50),
                    "radius": mp.nstr(radius, 50),
                }
            )
    return vectors


def predict_vectors() -> list[dict[str, object]]:
    vectors = []
    for n, alpha in itertools.product(ROWS, (0.001, 0.05, 0.25, 0.5)):
        border = fewest_votes(n, Fraction(alpha) / 2)
        if border > n:
            continue
        tops = {k for k in (border - 1, border, (n + border) // 2, n) if math.ceil(n / 2) <= k <= n}
        for top, third in itertools.product(sorted(tops), (0, 7)):
            counts = [n - top, min(third, n - top), top]
            vectors.append({"counts": counts, "alpha": alpha, "answers": top >= border})
    return vectors


if __name__ == "__main__":
    vectors = {"certify": certify_vectors(), "predict": predict_vectors()}
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(vector) for vector in group) + "\n]"
        for name, group in vectors.items()
    ]
    Path(__file__).with_name("vectors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
