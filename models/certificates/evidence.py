"""Recomputes a certificate's result from its question and its evidence: plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from models.certificates.alpha import alpha_shares, stage_shares
from models.certificates.anytime import Anytime, certify_anytime
from models.certificates.cascade import Cascade, certify_cascade
from models.certificates.counts import runner_up
from models.certificates.rules import Certificate, certify

TOLERANCE = 1e-8
"""Largest difference of two sound computations, in parts of the larger of 1 and the value."""


def total_variation(shape: tuple[int, int, int], sigma: float) -> float:
    """Bound on the total variation distance of a row's drawn noise from the ideal, without torch.

    `shape` is (channels, height, width). A pixel has fewer than 5000 sigma + 10 thresholds, and
    each blurs one word in 2^63; redraws double that. Never below `models.noise.total_variation`.
    """
    return math.prod(shape) * (5000 * sigma + 10) * 2.0**-62


def recompute(
    question: Mapping[str, Any], evidence: Mapping[str, Any], classes: int
) -> Certificate:
    """The certificate that the evidence proves about the question, for a task of K `classes`.

    Both are the sections of a certificate document (docs/certificate.md). Counts are sparse: label
    index, as a string, -> votes. Each look is [rows, votes of the label, largest other votes].

    Raises ValueError for counts or looks that do not fit the question's rows, other shares of alpha
    than the method's, a target, looks or stages that the method has not, and what `certify`,
    `certify_anytime` and `certify_cascade` reject.
    """
    method, target, sigma = question["method"], question["target_radius"], question["sigma"]
    if isinstance(sigma, list) is not (method == "cascade"):
        raise ValueError(f"sigma = {sigma}: a cascade has several, any other method has one")
    if method == "cascade":
        shares = stage_shares(question["alpha"], len(sigma))
    else:
        shares = alpha_shares(method, question["alpha"], target is not None)
    if question["alpha_shares"] != shares:
        raise ValueError(f"alpha_shares = {question['alpha_shares']}: must be {shares}")
    passed = evidence.get("passed_counts")
    if (passed is None) is (method == "cascade"):
        raise ValueError(f"passed_counts = {passed}: a cascade has them, no other method does")
    if method == "anytime":
        return _recompute_anytime(question, evidence, classes)
    for name, value in (
        ("target_radius", target),
        ("looks", question["looks"]),
        ("looks", evidence["looks"] or None),
    ):
        if value is not None:
            raise ValueError(f"{name} = {value}: {method} has none")
    if method == "cascade":
        return _recompute_cascade(question, evidence, classes)
    return certify(
        _dense("selection_counts", evidence["selection_counts"], classes, question["n0"]),
        _dense("estimation_counts", evidence["estimation_counts"], classes, question["n"]),
        sigma,
        question["alpha"],
        method=method,
        total_variation=evidence["total_variation"],
    )


def looks_of(label: int, votes: Sequence[Sequence[int]]) -> list[list[int]]:
    """The looks of a certificate: rows, votes of the label, largest other votes of each.

    `votes` are the cumulative estimation votes (K,) at each look.
    """
    return [[sum(look), look[label], look[runner_up(label, look)]] for look in votes]


def sparse(counts: Sequence[int]) -> dict[str, int]:
    """The nonzero counts (K,) by label index, as a certificate states them."""
    return {str(index): count for index, count in enumerate(counts) if count}


def _dense(name: str, votes: Mapping[str, int], classes: int, rows: int) -> list[int]:
    """The sparse votes by class (K,).

    Raises ValueError, naming the field, unless they are in range and sum to `rows`.
    """
    counts = [0] * classes
    for key, count in votes.items():
        index = int(key) if key.isdecimal() else classes
        if index >= classes or str(index) != key:
            raise ValueError(f"{name} has the key {key!r}: must be a label index below {classes}")
        if count < 1:
            raise ValueError(f"{name} has {count} votes for label {key}: the smallest number is 1")
        counts[index] = count
    if sum(counts) != rows:
        raise ValueError(f"{name} sum to {sum(counts)}: must be {rows}, the rows of the question")
    return counts


def _recompute_cascade(
    question: Mapping[str, Any], evidence: Mapping[str, Any], classes: int
) -> Certificate:
    n0, n = question["n0"], question["n"]
    asked = Cascade(tuple(question["sigma"]), question["alpha"], n0, n, evidence["total_variation"])
    read = [
        *(("passed_counts", votes) for votes in evidence["passed_counts"]),
        ("estimation_counts", evidence["estimation_counts"]),
    ]
    selection = _dense("selection_counts", evidence["selection_counts"], classes, n0)
    return certify_cascade(
        asked, selection, [_dense(name, votes, classes, n) for name, votes in read]
    )


def _recompute_anytime(
    question: Mapping[str, Any], evidence: Mapping[str, Any], classes: int
) -> Certificate:
    schedule, looks = question["looks"] or [], evidence["looks"]
    if not schedule or schedule[-1] != question["n"] or not _ascends([0, *schedule], 1):
        raise ValueError(f"looks = {schedule}: must ascend to n = {question['n']}")
    if not looks or [rows for rows, _, _ in looks] != schedule[: len(looks)]:
        raise ValueError(f"looks = {looks}: must be at the first rows of the schedule")
    asked = Anytime(
        sigma=question["sigma"],
        alpha=question["alpha"],
        n0=question["n0"],
        n=question["n"],
        target_radius=question["target_radius"],
        looks_schedule=tuple(schedule),
        total_variation=evidence["total_variation"],
    )
    selection = _dense("selection_counts", evidence["selection_counts"], classes, question["n0"])
    estimation = _dense("estimation_counts", evidence["estimation_counts"], classes, looks[-1][0])
    label = selection.index(max(selection))
    rival = runner_up(label, estimation)
    if looks[-1:] != looks_of(label, [estimation]):
        raise ValueError(f"looks = {looks}: the last must have the votes of estimation_counts")
    for earlier, later in pairwise([[0, 0, 0], *looks]):
        others = [look[0] - look[1] for look in (earlier, later)]
        rivals = [look[2] for look in (earlier, later)]
        if not (_ascends([earlier[1], later[1]], 0) and _ascends(others, 0)):
            raise ValueError(f"looks = {looks}: votes must not be taken back")
        if not (_ascends(rivals, 0) and rivals[1] - rivals[0] <= others[1] - others[0]):
            raise ValueError(f"looks = {looks}: the largest other votes must fit the rows")
        most = sum(min(count, rivals[1]) for i, count in enumerate(estimation) if i != label)
        if others[1] > most:
            raise ValueError(f"looks = {looks}: {later[2]} are too few for the largest other votes")
    # Before the last look a bound depends on the label's votes alone.
    votes = [[0] * classes for _ in looks[:-1]]
    for dense, (rows, own, _) in zip(votes, looks, strict=False):
        dense[label], dense[rival] = own, rows - own
    return certify_anytime(asked, selection, [*votes, estimation])


def _ascends(numbers: Sequence[int], least_step: int) -> bool:
    return all(later - earlier >= least_step for earlier, later in pairwise(numbers))
