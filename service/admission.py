"""The door's rules, written once for every engine: who is let in, and what the others are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from service.engine import RETRY_SECONDS, retry_seconds
from service.errors import Backlog, IdempotencyMismatch, InvalidField
from service.jobs import Job

Served = Counter[tuple[str, str]]
"""How many live workers serve a task under a digest."""


def most_served(served: Served) -> Mapping[str, str]:
    """Every served task with the digest that most workers have; equal ones go by name."""
    by_workers = sorted(served.items(), key=lambda item: (item[1], item[0]))
    return {task: bundle for (task, bundle), _ in by_workers}


def another_request() -> IdempotencyMismatch:
    """The refusal of a key that came before with another fingerprint."""
    return IdempotencyMismatch("This Idempotency-Key came before with another request.")


def too_large(job: Job, bound: int) -> InvalidField:
    """The refusal of a job that alone is larger than the backlog's bound in rows."""
    return InvalidField(
        f"The job needs {job.rows} rows of noise, and this service queues at most "
        f"{bound} at once; ask for fewer.",
        limit=bound,
    )


def unserved(job: Job) -> Backlog:
    """The refusal of a job whose bundle no live worker serves."""
    return Backlog(f"No worker serves task {job.task!r} now.", retry_after=RETRY_SECONDS)


def full(job: Job, backlog_rows: int, rows_per_second: float) -> Backlog:
    """The refusal of a job for which the rows that wait leave no room."""
    return Backlog(
        f"{backlog_rows} rows of noise are waiting; there is no room for {job.rows} more.",
        retry_after=retry_seconds(backlog_rows, rows_per_second),
    )
