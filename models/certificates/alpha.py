"""Alpha, the probability that a certificate is wrong, and the parts that its bounds spend of it."""

from __future__ import annotations

import math
from fractions import Fraction

ALPHA_MIN = 1e-100
"""Smallest level accepted: float64 tails are accurate down to here, subnormal ones are not."""

ALPHA_MAX = 0.5
"""Largest level accepted: above 1/2 the statement is more likely false than true."""

RUNNER_UP_SHARE = 0.1
"""The runner-up's share of the level that its rule gets (method.md 4)."""

LOOKS_SHARE = {False: 0.1, True: 0.2}
"""The looks' share of alpha in early stopping, without and with a target radius."""

METHODS = ("two-sided", "cohen")
"""The rules of `certify`."""


def alpha_shares(method: str, alpha: float, with_target: bool = False) -> dict[str, float]:
    """The parts of alpha by what they are spent on; they sum to at most alpha.

    "label" bounds the class from below and "runner_up" the others from above, both on all n rows;
    "looks" bounds the class at every look of "anytime" (method.md 4b).

    Raises ValueError for an unknown method, an alpha outside [ALPHA_MIN, ALPHA_MAX], and a share
    below ALPHA_MIN.
    """
    if method not in (*METHODS, "anytime"):
        raise ValueError(f"method = {method}: must be one of {', '.join(METHODS)}, anytime")
    check_alpha(alpha)
    shares = {}
    if method == "anytime":
        shares["looks"] = alpha * LOOKS_SHARE[with_target]
    if method != "cohen":
        shares["runner_up"] = (alpha - sum(shares.values())) * RUNNER_UP_SHARE
    # Two roundings of at most half an ulp each, and one ulp less.
    spent = sum(shares.values())
    label = alpha if spent == 0.0 else math.nextafter(alpha - spent, 0.0)
    if (least := min([label, *shares.values()])) < ALPHA_MIN:
        raise ValueError(
            f"alpha = {alpha}: the smallest of its shares is {least:.3g}, "
            f"which must be at least {ALPHA_MIN}"
        )
    return {"label": label, **shares}


def stage_shares(alpha: float, stages: int) -> dict[str, float]:
    """The parts of alpha in a cascade, whose `stages` have two sides each: all equal.

    They sum to at most alpha. Raises ValueError for an alpha outside [ALPHA_MIN, ALPHA_MAX], and
    for a share below ALPHA_MIN.
    """
    check_alpha(alpha)
    share = math.nextafter(alpha / (2 * stages), 0.0)
    if share < ALPHA_MIN:
        raise ValueError(
            f"alpha = {alpha}: the share of a stage's side is {share:.3g}, "
            f"which must be at least {ALPHA_MIN}"
        )
    return {
        f"stage_{i}_{side}": share for i in range(1, stages + 1) for side in ("label", "others")
    }


def family_share(family_alpha: float, m: int) -> float:
    """The alpha of each of m statements: the largest whose m-fold is at most `family_alpha`.

    All m statements hold together with probability at least 1 - `family_alpha` (Bonferroni).

    Raises ValueError for a `family_alpha` outside (0, ALPHA_MAX), and for an m below 1.
    """
    if not 0.0 < family_alpha < ALPHA_MAX:
        raise ValueError(f"family alpha = {family_alpha}: must be above 0 and below {ALPHA_MAX}")
    if m < 1:
        raise ValueError(f"m = {m}: must be at least 1")
    share = family_alpha / m
    return share if m * Fraction(share) <= Fraction(family_alpha) else math.nextafter(share, 0.0)


def check_alpha(alpha: float) -> None:
    """Raises ValueError unless alpha is in [ALPHA_MIN, ALPHA_MAX]."""
    if not ALPHA_MIN <= alpha <= ALPHA_MAX:
        raise ValueError(f"alpha = {alpha}: must be in [{ALPHA_MIN}, {ALPHA_MAX}]")
