"""Limits and times of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from service.config import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of every engine.

    - `shard_rows`: most rows of a shard.
    - `lease_seconds`: life of a lease that the worker does not renew.
    - `max_queue_rows`: most rows that wait or are leased.
    - `max_queue_rows_per_key`: most of them of one owner, where given.
    - `retention_seconds`: life of a job after its end; of an unfinished one, after its submission.
    - `max_finished_jobs`: most finished jobs that the engine retains.
    - `max_results`: most of them with a result, which is large.
    - `unserved_seconds`: a job fails after no live worker has announced its digest for this time.
    - `starvation_seconds`: a task unserved for longer goes before the preferred one.
    - `worker_seconds`: a worker without a pull for longer is not alive.
    """

    shard_rows: int
    lease_seconds: float = 30.0
    max_queue_rows: int = 200_000
    max_queue_rows_per_key: int | None = None
    retention_seconds: float = 86_400.0
    max_finished_jobs: int = 100_000
    max_results: int = 100
    unserved_seconds: float = 300.0
    starvation_seconds: float = 1.0
    worker_seconds: float = 30.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The options that the operator has set."""
        return cls(
            shard_rows=settings.shard_rows,
            lease_seconds=settings.lease_seconds,
            max_queue_rows=settings.max_queue_rows,
            max_queue_rows_per_key=settings.max_queue_rows_per_key,
            retention_seconds=settings.retention_seconds,
            max_finished_jobs=settings.max_finished_jobs,
            worker_seconds=max(30.0, settings.lease_seconds),
        )
