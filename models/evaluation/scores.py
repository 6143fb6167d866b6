"""Figures over many certified images: average radius, and accuracy by radius."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
