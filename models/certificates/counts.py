"""Vote counts by class: their checks, and the runner-up among them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = Sequence[int] | NDArray[np.integer]


def checked_counts(name: str, counts: Counts) -> tuple[int, ...]:
    """The counts as Python integers; ValueError unless two or more non-negative integers."""
    try:
        checked = tuple(map(operator.index, counts))
    except TypeError as error:
        raise ValueError(f"{name} = {counts}: must be integers by class") from error
    if len(checked) < 2:
        raise ValueError(f"{name} has {len(checked)} classes: the smallest number is 2")
    if min(checked) < 0:
        raise ValueError(f"{name} holds {min(checked)}: the smallest count is 0")
    return checked


def checked_pair(
    selection_counts: Counts, estimation_counts: Counts
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both tallies as `checked_counts` gives them; ValueError for unequal numbers of classes."""
    selection = checked_counts("selection_counts", selection_counts)
    estimation = checked_counts("estimation_counts", estimation_counts)
    if len(selection) != len(estimation):
        raise ValueError(
            f"selection_counts has {len(selection)} classes and estimation_counts "
            f"{len(estimation)}: they must be equal"
        )
    return selection, estimation


def runner_up(label: int, votes: Sequence[int]) -> int:
    """The class other than `label` with most of the votes (K,), the lowest index of equal ones."""
    return max((c for c in range(len(votes)) if c != label), key=lambda c: (votes[c], -c))
