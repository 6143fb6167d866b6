"""certificates/abstention.py: the rows another question would need, by the rules themselves."""

from __future__ import annotations

import numpy as np
import pytest

from models.certificates.abstention import MOST_ROWS, rows_needed
from models.certificates.alpha import alpha_shares
from models.certificates.rules import bound_votes, predict


def certifies(method: str, votes: tuple[int, ...], label: int = 0) -> bool:
    return bound_votes(label, votes, 0.25, alpha_shares(method, 0.001), 0.0).radius > 0.0


@pytest.mark.parametrize(
    ("method", "votes"),
    [
        ("two-sided", (520, 480)),
        ("two-sided", (380, 330, 290, 0)),
        ("cohen", (520, 480)),
        ("cohen", (60, 40, 0)),
    ],
)
def test_the_rows_would_do_and_half_of_them_would_not(method: str, votes: tuple[int, ...]) -> None:
    """With the same shares of votes the estimate is enough, and far fewer rows are not."""
    needed = rows_needed(votes, 0, lambda more: certifies(method, more))
    assert needed is not None
    assert sum(votes) < needed <= MOST_ROWS
    own = np.array(votes) / sum(votes)
    enough, half = (
        (rows - sum(others), *others)
        for rows in (needed + 10, needed // 2)
        for others in [np.floor(rows * own[1:]).astype(int).tolist()]
    )
    assert certifies(method, enough)
    assert not certifies(method, half)


def test_many_labels_with_a_vote_each_leave_an_estimate() -> None:
    """Others' votes are rounded up, at few rows beyond the rows that there are."""
    needed = rows_needed((22, *[1] * 78), 0, lambda more: certifies("two-sided", more))
    assert needed is not None
    assert 100 < needed < 300


def test_predict_needs_rows_too() -> None:
    """56 votes to 44 are too few at alpha .001; eight times as many are about enough."""
    needed = rows_needed((56, 44), 0, lambda more: not predict(more, 0.001).abstained)
    assert needed is not None
    assert 600 < needed < 900


@pytest.mark.parametrize(
    ("votes", "label"), [((501, 499), 0), ((500, 500), 0), ((400, 600), 0), ((400, 600, 0), 2)]
)
def test_votes_that_no_rows_would_settle(votes: tuple[int, ...], label: int) -> None:
    """A tie, a label behind another, and a lead that 100,000 rows do not show have no estimate."""
    assert rows_needed(votes, label, lambda more: certifies("two-sided", more, label)) is None
