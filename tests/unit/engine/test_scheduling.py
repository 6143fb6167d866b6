"""service/engine/scheduling.py: whose turn it is."""

from __future__ import annotations

import pytest

from service.engine.scheduling import Candidate, next_offer

SLOW, FAST = Candidate("slow", False, 0.9), Candidate("fast", True, 0.1)
STARVED, STARVED_LONGER = Candidate("starved", False, 1.5), Candidate("longer", False, 2.5)


@pytest.mark.parametrize(
    ("offers", "prefer_task", "taken"),
    [
        ([], "slow", None),
        ([SLOW, FAST], None, FAST),
        ([SLOW, FAST], "slow", SLOW),
        ([SLOW, FAST], "none", FAST),
        ([STARVED, FAST, STARVED_LONGER], "fast", STARVED_LONGER),
    ],
    ids=["nothing", "fast first", "preferred", "preferred has nothing", "starved"],
)
def test_turns(offers: list[Candidate], prefer_task: str | None, taken: Candidate | None) -> None:
    """A starved task goes first, then the preferred one, then `hi` before `lo`."""
    assert next_offer(offers, prefer_task, starvation_seconds=1) == taken
