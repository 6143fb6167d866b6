"""Scheduling rules of every engine: the task and priority of the next shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAST_PULLS = 3
"""Consecutive pulls of one task that may take no shard of its waiting `lo` priority.

The next pull begins there, so CERTIFY gets a quarter of the pulls beside any load of PREDICT.
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """The next shard of one task and bundle; `fast` where its priority is `hi`.

    `waited` counts seconds from the later of the job's submission and the queue's last pull.
    """

    task: str
    fast: bool
    waited: float


def next_offer(
    offers: Iterable[Candidate], prefer_task: str | None, starvation_seconds: float
) -> Candidate | None:
    """The candidate to serve: a starved one, else the preferred task's, else the most urgent."""
    offers = list(offers)
    starved = [offer for offer in offers if offer.waited > starvation_seconds]
    if starved:
        return max(starved, key=lambda offer: offer.waited)
    preferred = [offer for offer in offers if offer.task == prefer_task]
    return max(preferred or offers, key=lambda offer: (offer.fast, offer.waited), default=None)
