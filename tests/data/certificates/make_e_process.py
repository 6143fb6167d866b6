"""Writes e_process.json: exact e-processes and their bounds, independent of certificates/bounds.py.

Run `python tests/data/certificates/make_e_process.py` from the repository root (needs mpmath; a
minute). The incomplete beta function is summed in 230-bit fixed point, with positive terms alone;
all else is 65-digit arithmetic. `bound` solves log E(p0) = -log(level) by bisection and Anderson
and Bjorck's method. Every float stands for the exact value of its binary form; results are stored
to 50 digits.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from mpmath import mp, mpf

mp.dps = 65
BITS = 230
ROWS = (1, 2, 10, 57, 100, 425, 1000, 10_000, 100_000)
LEVELS = (1e-100, 1e-9, 2e-4, 0.005, 0.5)
POINTS = (1e-9, 0.01, 0.3, 0.5, 0.8413447460685429, 0.9772498680518208, 0.999, 1.0 - 2.0**-30)


def log_beta(a: mpf, b: mpf) -> mpf:
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


def lower_tail(k: int, n: int, x: mpf) -> mpf:
    """P(Beta(k + 1/2, n - k + 1/2) <= x), for x not far above the mean."""
    a, b = k + mpf(1) / 2, n - k + mpf(1) / 2
    one = 1 << BITS
    ratio = int(x * one)
    term, total, j = one, one, 0
    while term:
        term = (term * ratio >> BITS) * (2 * n + 2 + 2 * j) // (2 * k + 3 + 2 * j)
        total += term
        j += 1
    return mp.exp(a * mp.log(x) + b * mp.log(1 - x) - log_beta(a, b)) / a * total / one


def upper_tail(k: int, n: int, x: mpf) -> mpf:
    """P(Beta(k + 1/2, n - k + 1/2) > x)."""
    # Few terms, and no cancellation above the mean.
    if x < 0.5 and x * (n + 1) < k + mpf(1) / 2:
        return 1 - lower_tail(k, n, x)
    return lower_tail(n - k, n, 1 - x)


def log_e(k: int, n: int, p0: mpf) -> mpf:
    half = mpf(1) / 2
    value = log_beta(k + half, n - k + half) + mp.log(upper_tail(k, n, p0))
    value -= mp.log(2 * mp.acos(mp.sqrt(p0)))
    return value - k * mp.log(p0) - (n - k) * mp.log(1 - p0)


def lower_bound(k: int, n: int, level: float) -> mpf:
    """The p0 below k / n with log E = -log(level)."""
    wanted = -mp.log(mpf(level))
    low, high = mpf(10) ** -250, mpf(k) / n if k < n else 1 - mpf(10) ** -40
    while high - low > low / 1000 and high - low > (1 - high) / 1000:
        # Halves in the scale of whichever of low and 1 - high is still far away.
        middle = mp.sqrt(low * high) if high > 4 * low else (low + high) / 2
        low, high = (middle, high) if log_e(k, n, middle) >= wanted else (low, middle)
    return mp.findroot(
        lambda p0: log_e(k, n, p0) - wanted,
        (low, high),
        solver="anderson",
        tol=mpf(10) ** -60 * low,
        maxsteps=200,
        verify=False,
    )


def tallies(n: int) -> list[int]:
    shares = {round(n * share) for share in (0.05, 0.3, 0.5, 0.8, 0.9, 0.99)}
    return sorted({k for k in shares | {1, n - 1, n} if 0 < k <= n})


def bounds() -> list[dict[str, object]]:
    found = []
    for n, level in itertools.product(ROWS, LEVELS):
        for k in tallies(n):
            bound = mp.nstr(lower_bound(k, n, level), 50)
            found.append({"k": k, "n": n, "level": level, "bound": bound})
    return found


def values() -> list[dict[str, object]]:
    found = []
    for n in ROWS:
        for k, p0 in itertools.product([0, *tallies(n)], POINTS):
            value = log_e(k, n, mpf(p0))
            if value > -700:
                found.append({"k": k, "n": n, "p0": p0, "log_e": mp.nstr(value, 50)})
    return found


if __name__ == "__main__":
    vectors = {"log_e": values(), "bounds": bounds()}
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(vector) for vector in group) + "\n]"
        for name, group in vectors.items()
    ]
    Path(__file__).with_name("e_process.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
