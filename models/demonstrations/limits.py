"""Kinds of demonstrations, and the noise rows that each is charged as; no torch."""

from __future__ import annotations

from enum import StrEnum

SHOWN_ROWS = 6
"""Rows that a demonstration of rows shows."""

STEPS = 20
"""Steps of projected gradient descent."""
ATTACKED_ROWS = 3
"""Rows of an attack's loss, the same in every step."""
LABEL_ROWS = 8
"""Rows of the clean image that choose the label to attack."""
PASS_ROWS = 2 * STEPS * ATTACKED_ROWS
"""Rows that the steps are charged as: one forward and one backward pass a step and row.

Weights need no gradient, so a backward pass costs about a forward one. With LABEL_ROWS these are
two device batches of 64 rows, the smallest of a GPU and of a CPU where memory does not lower them.
"""


class Demonstration(StrEnum):
    """The kind of a job that answers no question: pictures of rows, or of an attack."""

    ROWS = "rows"
    ATTACK = "attack"

    @property
    def priority(self) -> str:
        """`lo`, as that of a certification."""
        return "lo"

    @property
    def rows(self) -> int:
        """Number of noise rows."""
        return SHOWN_ROWS if self is Demonstration.ROWS else LABEL_ROWS

    @property
    def charge(self) -> int:
        """Rows that the demonstration costs."""
        return self.rows + (PASS_ROWS if self is Demonstration.ATTACK else 0)
