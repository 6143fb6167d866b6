"""Reasons for an abstention, and the rows that another question would need."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from enum import StrEnum

from models.certificates.limits import MOST_ROWS


class Reason(StrEnum):
    """The reason for an abstention.

    TOO_FEW_ROWS: more rows with the same shares of votes would prove a label, or let a cascade pass
    the stage. TOO_CLOSE: not even MOST_ROWS would. HOPELESS: a target radius was given up before
    any radius was proven.
    """

    TOO_CLOSE = "too_close"
    TOO_FEW_ROWS = "too_few_rows"
    HOPELESS = "hopeless"


def rows_needed(
    votes: Sequence[int], label: int, proves: Callable[[tuple[int, ...]], bool]
) -> int | None:
    """About the fewest rows that would prove what `proves` says, with these shares of votes (K,).

    `proves` gets votes (K,) of more rows, rounded up but for those of `label`. None where MOST_ROWS
    would not do, or another class has at least as many votes. It is an estimate: another question
    has other rows.
    """
    rows = sum(votes)
    if votes[label] <= max(count for index, count in enumerate(votes) if index != label):
        return None

    def scaled(n: int) -> tuple[int, ...]:
        more = [-(-n * count // rows) for count in votes]  # Others are rounded up.
        more[label] = max(0, n - (sum(more) - more[label]))
        return tuple(more)

    found = bisect_left(range(rows, MOST_ROWS + 1), True, key=lambda n: proves(scaled(n)))
    return rows + found if rows + found <= MOST_ROWS else None
