"""The door's rules, written once for every engine: who is let in, and what the others are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from service.engine import RETRY_SECONDS, retry_seconds
from service.errors import Backlog, IdempotencyMismatch, InvalidField, QuotaExceeded, as_json
from service.jobs import Job

Served = Counter[tuple[str, str]]
"""How many live workers serve a task under a digest."""


def most_served(served: Served) -> Mapping[str, str]:
    """Every served task with the digest that most workers have; equal ones go by name."""
    by_workers = sorted(served.items(), key=lambda item: (item[1], item[0]))
    return {task: bundle for (task, bundle), _ in by_workers}


def every_digest(served: Served) -> Mapping[str, frozenset[str]]:
    """Every served task with all digests that workers have of it."""
    found: dict[str, set[str]] = {}
    for task, bundle in served:
        found.setdefault(task, set()).add(bundle)
    return {task: frozenset(bundles) for task, bundles in found.items()}


def another_request() -> IdempotencyMismatch:
    """The refusal of a key that came before with another fingerprint."""
    return IdempotencyMismatch("This Idempotency-Key came before with another request.")


def most_rows(owner: str | None, backlog_rows: int, owner_rows: int | None) -> int:
    """The bound in rows of one job: the backlog's, or its owner's where that is less."""
    if owner is None or owner_rows is None:
        return backlog_rows
    return min(backlog_rows, owner_rows)


def too_large(job: Job, bound: int) -> InvalidField:
    """The refusal of a job that alone is larger than its bound in rows."""
    return InvalidField(
        f"The job needs {job.rows} rows of noise, and this service queues at most "
        f"{bound} at once; ask for fewer.",
        limit=bound,
    )


def unserved(task: str) -> Backlog:
    """The refusal of a job whose bundle no live worker serves."""
    return Backlog(f"No live worker serves task {as_json(task)} now.", retry_after=RETRY_SECONDS)


def full(rows: int, backlog_rows: int, rows_per_second: float) -> Backlog:
    """The refusal of `rows` more for which those that wait leave no room."""
    return Backlog(
        f"{backlog_rows} rows of noise are waiting; there is no room for {rows} more.",
        retry_after=retry_seconds(backlog_rows, rows_per_second),
    )


def over_quota(rows: int, owner_rows: int, bound: int, rows_per_second: float) -> QuotaExceeded:
    """The refusal of `rows` more to an owner of whose rows `owner_rows` wait already."""
    return QuotaExceeded(
        f"{owner_rows} rows of noise are waiting for this key, which may have {bound} at once; "
        f"there is no room for {rows} more.",
        retry_after=retry_seconds(owner_rows, rows_per_second),
        limit=bound,
    )
