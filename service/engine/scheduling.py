"""Which task and lane a worker is given next: the rules, written once for every engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAST_PULLS = 3
"""Pulls of one task in a row that may leave its waiting `lo` lane without a shard.

The next begins there: PREDICT goes first, and CERTIFY keeps a quarter however much of it comes.
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Work that waits for one task and bundle; `fast` where a `hi` shard is next.

    What is next has gone unserved for `waited` seconds.
    """

    task: str
    fast: bool
    waited: float


def next_offer(
    offers: Iterable[Candidate], prefer_task: str | None, starvation_seconds: float
) -> Candidate | None:
    """The offer to take: a starved one, else the preferred task's, else the most urgent."""
    offers = list(offers)
    starved = [offer for offer in offers if offer.waited > starvation_seconds]
    if starved:
        return max(starved, key=lambda offer: offer.waited)
    preferred = [offer for offer in offers if offer.task == prefer_task]
    return max(preferred or offers, key=lambda offer: (offer.fast, offer.waited), default=None)
