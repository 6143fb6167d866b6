"""Recomputes a certificate's result from its question and its evidence: plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.certificates import Certificate, certify

TOLERANCE = 1e-9
"""Largest difference, absolute, between two sound computations of a bound or a radius."""


def total_variation(shape: tuple[int, int, int], sigma: float) -> float:
    """Bound on the total variation distance of a row's drawn noise from the ideal, without torch.

    `shape` is (channels, height, width). A pixel has fewer than 5000 sigma + 10 thresholds, and
    each blurs one word in 2^63; redraws double that. Never below `models.noise.total_variation`.
    """
    return math.prod(shape) * (5000 * sigma + 10) * 2.0**-62


def alpha_shares(method: str, alpha: float) -> dict[str, float]:
    """The parts of alpha that the bounds of a method spend.

    Raises ValueError for a method that proves no radius.
    """
    if method != "cohen":
        raise ValueError(f"method = {method!r}: must be cohen")
    return {"p_lower": alpha}


def recompute(
    question: Mapping[str, Any], evidence: Mapping[str, Any], classes: int
) -> Certificate:
    """The certificate that the evidence proves about the question, for a task of K `classes`.

    Both are the sections of a certificate document (docs/certificate.md). Counts are sparse: label
    index, as a string, -> votes.

    Raises ValueError for counts that do not fit the question's rows, other shares of alpha than the
    method's, a target or looks that the method has not, and what `certify` rejects.
    """
    if question["alpha_shares"] != alpha_shares(question["method"], question["alpha"]):
        raise ValueError(
            f"alpha_shares = {question['alpha_shares']}: must be the shares of {question['method']}"
        )
    for name, value in (
        ("target_radius", question["target_radius"]),
        ("looks", question["looks"] or evidence["looks"] or None),
    ):
        if value is not None:
            raise ValueError(f"{name} = {value}: {question['method']} has none")
    selection = _dense("selection_counts", evidence, classes, question["n0"])
    estimation = _dense("estimation_counts", evidence, classes, question["n"])
    return certify(
        selection,
        estimation,
        question["sigma"],
        question["alpha"],
        total_variation=evidence["total_variation"],
    )


def norms(radius: float, shape: tuple[int, int, int]) -> dict[str, float]:
    """The radius of the certified ball in other norms, rounded down (method.md 4d).

    The l2 ball holds the l1 ball of its radius, and the l-infinity ball of radius / sqrt(d) for an
    image of d values.
    """
    largest = math.nextafter(radius / math.sqrt(math.prod(shape)) * (1.0 - 2.0**-50), 0.0)
    return {"l1": radius, "l2": radius, "linf": largest}


def sparse(counts: tuple[int, ...]) -> dict[str, int]:
    """The nonzero counts (K,) by label index, as a certificate states them."""
    return {str(index): count for index, count in enumerate(counts) if count}


def _dense(name: str, evidence: Mapping[str, Any], classes: int, rows: int) -> list[int]:
    """The counts (K,); raises ValueError unless they are whole, in range and sum to `rows`."""
    counts = [0] * classes
    for key, count in evidence[name].items():
        index = int(key) if key.isdecimal() else classes
        if index >= classes or str(index) != key:
            raise ValueError(f"{name} has the key {key!r}: must be a label index below {classes}")
        if count < 1:
            raise ValueError(f"{name} has {count} votes for label {key}: the smallest number is 1")
        counts[index] = count
    if sum(counts) != rows:
        raise ValueError(f"{name} sum to {sum(counts)}: must be {rows}, the rows of the question")
    return counts
