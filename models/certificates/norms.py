"""A certified l2 radius in the terms of other attacks: method.md 4d."""

from __future__ import annotations

import math

LEVELS = 255
"""Gray levels between pixel values 0 and 1."""

_MARGIN = 4e-15
"""Relative; ten times the rounding errors of a root, a division and two products."""


def attack_norms(radius: float, shape: tuple[int, int, int]) -> dict[str, float | dict[str, float]]:
    """Changes that an l2 radius covers, in gray levels, rounded down; every smaller one too.

    `radius` in the [0, 1] pixel scale; `shape` is (channels, height, width), of d values in all.

    - "l2_gray_levels": the l2 norm of any change. The l1 norm has the same bound.
    - "linf_gray_levels": the largest change of a value, if every value may change: 255 R/sqrt(d).
    - "brightness_gray_levels": one shift of all values. It is the same number.
    - "patch_gray_levels": the largest change of a value within a square patch, by the patch's width
      in pixels: 1, 2, 4 and so on up to the smaller side.

    From the probability of the class alone exactly the open l2 ball is certified, so that these
    follow from it and nothing more does.
    """
    channels, height, width = shape
    levels = LEVELS * radius * (1.0 - _MARGIN)
    uniform = levels / math.sqrt(channels * height * width)
    widths = [2**i for i in range(min(height, width).bit_length())]
    return {
        "l2_gray_levels": levels,
        "linf_gray_levels": uniform,
        "brightness_gray_levels": uniform,
        "patch_gray_levels": {str(w): levels / (w * math.sqrt(channels)) for w in widths},
    }
