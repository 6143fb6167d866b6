"""Vote counts from printed radii: the inverse of Cohen's rule, as far as rounding leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri

_EQUAL = 1e-9
"""Relative difference below which two printed radii are the same decimal number."""
_ROUNDING = 1e-6
"""Share of a printed radius's last digit that may be lost before it is rounded down."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """The counts behind radii.

    `least` and `most` (N,) int64 are the fewest and the most votes that print as each radius, 0
    where none does. `readable` (M,) int64 are the numbers of missing votes, ascending from 1, whose
    radius prints differently from every other. `largest` is the radius, as printed, of a full
    tally, which misses none; `full` are such radii.
    """

    least: NDArray[np.int64]
    most: NDArray[np.int64]
    readable: NDArray[np.int64]
    largest: float
    full: int

    @property
    def inconsistent(self) -> int:
        """Radii that no count gives."""
        return int((self.least == 0).sum())

    @property
    def ambiguous(self) -> int:
        """Radii that several counts give."""
        return int((self.most > self.least).sum())


def invert(radii: Sequence[Decimal], n: int, sigma: float, alpha: float) -> Inversion:
    """The counts of n rows that Cohen's rule maps to the printed radii.

    The log's rounding is read from its radii: as many decimals where all have as many, else
    significant digits; to nearest, unless rounding down explains more of them. Needs at least one
    radius, and an n that can certify.
    """
    k = np.arange(n // 2 + 1, n + 1)
    exact = np.asarray(sigma * ndtri(betaincinv(k, n - k + 1, alpha)), np.float64)
    exact = exact[exact > 0]
    unit = _last_digit(radii, exact)
    shown = np.array([float(radius) for radius in radii])
    found = [
        _matched(shown, printed, n)
        for printed in (np.round(exact / unit) * unit, np.floor(exact / unit + _ROUNDING) * unit)
    ]
    return min(found, key=lambda inversion: inversion.inconsistent)


def _last_digit(radii: Sequence[Decimal], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """The value (K,) of a unit in the last digit that the log prints of each exact radius."""
    positive = [radius for radius in radii if radius > 0] or list(radii)
    decimals = {-int(radius.as_tuple().exponent) for radius in positive}
    if len(decimals) == 1:
        return np.full(exact.shape, 10.0 ** -decimals.pop())
    digits = max(len(radius.normalize().as_tuple().digits) for radius in positive)
    return np.asarray(10.0 ** (np.floor(np.log10(exact)) + 1 - digits))


def _matched(shown: NDArray[np.float64], printed: NDArray[np.float64], n: int) -> Inversion:
    """The inversion of `shown` (N,), where the last K counts up to n print as `printed` (K,)."""
    left = np.searchsorted(printed, shown * (1 - _EQUAL), "left")
    right = np.searchsorted(printed, shown * (1 + _EQUAL), "right")
    first = n + 1 - len(printed)
    least = np.where(right > left, first + left, 0)
    most = np.where(right > left, first + right - 1, 0)
    differs = np.diff(printed[::-1]) < -_EQUAL * printed[-1]
    readable = np.flatnonzero(differs[:-1] & differs[1:]) + 1
    return Inversion(least, most, readable, float(printed[-1]), int((most == n).sum()))
