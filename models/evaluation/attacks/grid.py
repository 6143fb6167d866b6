"""Attacked images as the service reads them: on the grid of 1/255."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NOISE = 1e-4
"""Gray levels by which float32 may miss a whole one; its square sums are then a little short."""
_SLACK = 1.001


def rounded(
    pixels: NDArray[np.uint8], attacked: NDArray[np.floating], eps: float
) -> NDArray[np.uint8]:
    """An image of the grid near `attacked`, at most eps (l2, [0,1] units) from `pixels`.

    `pixels` (C,H,W) is the original and `attacked` (C,H,W) lies in [0,1]. Changes are cut towards
    the original. Then the values with the largest remainders move one gray level on, as long as the
    distance stays within eps, and about as large as it was. At 224 pixels and eps 1 nearly every
    change is below one level, and cutting alone would undo the attack.
    """
    change = attacked.astype(np.float64) * 255 - pixels
    levels = np.floor(np.abs(change))
    length = min((255 * eps) ** 2, _SLACK * float((change**2).sum()))
    budget = length - float((levels**2).sum())
    remainders = np.abs(change) - levels
    order = np.argsort(-remainders, axis=None, kind="stable")
    costs = np.cumsum((2 * levels + 1).ravel()[order])
    moved = order[(costs <= budget) & (remainders.ravel()[order] > _NOISE)]
    levels.flat[moved] += 1
    found: NDArray[np.uint8] = np.clip(pixels + np.sign(change) * levels, 0, 255).astype(np.uint8)
    return found


def rounded_linf(
    pixels: NDArray[np.uint8], attacked: NDArray[np.floating], eps: float
) -> NDArray[np.uint8]:
    """The nearest image of the grid whose values are at most eps (l_inf) from those of `pixels`."""
    most = np.floor(255 * eps + _NOISE)
    change = np.rint(attacked.astype(np.float64) * 255 - pixels).clip(-most, most)
    found: NDArray[np.uint8] = np.clip(pixels + change, 0, 255).astype(np.uint8)
    return found


def distance(pixels: NDArray[np.uint8], attacked: NDArray[np.uint8]) -> float:
    """The l2 distance of two images in [0,1] units."""
    return float(np.linalg.norm(attacked.astype(np.float64).ravel() - pixels.ravel())) / 255
