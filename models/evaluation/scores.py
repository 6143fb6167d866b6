"""Figures over many certified images, and the intervals of figures."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILONS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Radii (l2, [0,1] pixel units) at which certified accuracy is reported."""
NORMAL_QUANTILE = 1.959963984540054
"""Of the standard normal distribution at 97.5 %."""


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


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Ends of the 95 % Wilson score interval of a share (Wilson, JASA 1927).

    Raises ValueError unless 0 <= successes <= total and total >= 1.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(f"{successes} successes of {total}: must be 0 to total, which is >= 1")
    share, square = successes / total, NORMAL_QUANTILE**2
    center = (share + square / (2 * total)) / (1 + square / total)
    spread = share * (1 - share) / total + square / (4 * total**2)
    half = NORMAL_QUANTILE / (1 + square / total) * math.sqrt(spread)
    return max(0.0, center - half), min(1.0, center + half)


def bootstrap(
    values: NDArray[np.float64], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of the values (N,), N >= 1, and the ends of its 95 % percentile bootstrap interval."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(values), (draws, len(values)), np.int32)
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def paired_bootstrap(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean difference of the same images' figures (N,), and the ends of its 95 % interval.

    Images are drawn with replacement, each with both of its figures (percentile bootstrap). Raises
    ValueError for arrays of different lengths.
    """
    if before.shape != after.shape:
        raise ValueError(f"{len(before)} images before and {len(after)} after; they must be equal")
    return bootstrap(after - before, draws, seed)


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
