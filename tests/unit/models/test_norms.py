"""certificates/norms.py: every change named lies inside the certified ball (method.md 4d)."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.certificates.norms import attack_norms

SHAPES = ((3, 32, 32), (3, 96, 96), (3, 224, 224), (1, 28, 20))


def squared(levels: float, values: int) -> Fraction:
    """Squared l2 norm, in the [0, 1] pixel scale, of a change by `levels` in `values` values."""
    return (Fraction(levels) / 255) ** 2 * values


@given(st.floats(1e-6, 20.0), st.sampled_from(SHAPES))
def test_changes_lie_inside_the_open_ball(radius: float, shape: tuple[int, int, int]) -> None:
    """Exactly: each norm is below the radius, and a 1e-12 larger one would not be."""
    channels, height, width = shape
    norms = attack_norms(radius, shape)
    patches = norms["patch_gray_levels"]
    assert isinstance(patches, dict)
    claims = [(norms["l2_gray_levels"], 1)]
    for name in ("linf_gray_levels", "brightness_gray_levels"):
        claims.append((norms[name], channels * height * width))
    claims += [(levels, channels * int(w) ** 2) for w, levels in patches.items()]
    for levels, values in claims:
        assert isinstance(levels, float)
        assert squared(levels, values) < Fraction(radius) ** 2
        assert squared(levels * (1 + 1e-12), values) > Fraction(radius) ** 2


@pytest.mark.parametrize(("side", "levels"), [(32, 2.7), (224, 0.39)])
def test_known_answers(side: int, levels: float) -> None:
    """R = 0.589 is 2.7 gray levels in every value at 32 x 32, 0.39 at 224 x 224 (method.md 4d)."""
    norms = attack_norms(0.589, (3, side, side))
    assert norms["linf_gray_levels"] == pytest.approx(levels, abs=0.05 if side == 32 else 0.005)
    assert norms["l2_gray_levels"] == pytest.approx(255 * 0.589)


def test_patches_double_up_to_the_smaller_side() -> None:
    """Their widths are powers of two that fit; a wider patch may change by less."""
    patches = attack_norms(0.5, (3, 224, 96))["patch_gray_levels"]
    assert isinstance(patches, dict)
    assert [*patches] == ["1", "2", "4", "8", "16", "32", "64"]
    assert all(wide < narrow for narrow, wide in itertools.pairwise(patches.values()))
    assert patches["1"] == pytest.approx(0.5 * 255 / 3**0.5)


def test_no_radius_covers_no_change() -> None:
    """An abstention has zeros."""
    assert attack_norms(0.0, (3, 8, 8))["linf_gray_levels"] == 0.0
