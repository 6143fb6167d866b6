"""Bounds and times of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from service.config import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Every engine takes the same.

    `max_queue_rows` rows may wait or be leased, `max_queue_rows_per_key` of one owner where given.
    Jobs are kept for `retention_seconds` after their end (unfinished ones: after their submission),
    the last `max_finished_jobs` of them at most. A task whose shards have not been served for
    `starvation_seconds` goes before the preferred one. A worker without a pull for `worker_seconds`
    is not alive. Jobs under a digest that no live worker announced for `unserved_seconds` fail.
    """

    shard_rows: int
    lease_seconds: float = 30.0
    max_queue_rows: int = 200_000
    max_queue_rows_per_key: int | None = None
    retention_seconds: float = 86_400.0
    max_finished_jobs: int = 100_000
    unserved_seconds: float = 300.0
    starvation_seconds: float = 1.0
    worker_seconds: float = 30.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """What an operator has set."""
        return cls(
            shard_rows=settings.shard_rows,
            lease_seconds=settings.lease_seconds,
            max_queue_rows=settings.max_queue_rows,
            max_queue_rows_per_key=settings.max_queue_rows_per_key,
            retention_seconds=settings.retention_seconds,
            max_finished_jobs=settings.max_finished_jobs,
            worker_seconds=max(30.0, settings.lease_seconds),
        )
