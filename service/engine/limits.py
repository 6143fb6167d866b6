"""Admission rules of every engine, and the problems of rejected jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from service.engine.protocol import RETRY_SECONDS, retry_seconds
from service.errors import Backlog, IdempotencyMismatch, InvalidField, QuotaExceeded, as_json
from service.jobs import Job, canonical_json

Served = Counter[tuple[str, str]]
"""Number of live workers by task and digest."""


def served_digests(served: Served) -> Mapping[str, tuple[str, ...]]:
    """Digests by served task: those of most workers first, equal ones by name in reverse."""
    found: dict[str, tuple[str, ...]] = {}
    for (task, digest), _ in sorted(
        served.items(), key=lambda item: (item[1], item[0]), reverse=True
    ):
        found[task] = (*found.get(task, ()), digest)
    return found


def distinct(numerics: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The numerics without repeats, ordered by their canonical JSON."""
    known = {canonical_json(described): described for described in numerics}
    return tuple(known[text] for text in sorted(known))


def another_request() -> IdempotencyMismatch:
    """The problem of an Idempotency-Key that belongs to a request of another fingerprint."""
    return IdempotencyMismatch("This Idempotency-Key came before with another request.")


def most_rows(owner: str | None, max_rows: int, max_rows_per_key: int | None) -> int:
    """The limit in rows of one job: `max_rows`, or less where the owner's limit is less."""
    if owner is None or max_rows_per_key is None:
        return max_rows
    return min(max_rows, max_rows_per_key)


def too_large(job: Job, bound: int) -> InvalidField:
    """The problem of a job that alone exceeds its limit, `bound` rows."""
    return InvalidField(
        f"The job needs {job.rows} rows of noise, and this service queues at most "
        f"{bound} at once; request fewer.",
        limit=bound,
    )


def unserved(task: str) -> Backlog:
    """The problem of a job whose bundle no live worker serves."""
    return Backlog(f"No live worker serves task {as_json(task)} now.", retry_after=RETRY_SECONDS)


def served_otherwise(task: str) -> Backlog:
    """The problem of a job where live workers serve another bundle under its task's name."""
    return Backlog(
        f"Live workers have another bundle of task {as_json(task)} than this process, so "
        "their votes are not about its labels. Give all processes the same tasks and the same "
        "release.",
        retry_after=RETRY_SECONDS,
    )


def full(rows: int, backlog_rows: int, rows_per_second: float) -> Backlog:
    """The problem of a job of `rows` that a backlog of `backlog_rows` leaves no room for."""
    return Backlog(
        f"{backlog_rows} rows of noise are waiting; there is no room for {rows} more.",
        retry_after=retry_seconds(backlog_rows, rows_per_second),
    )


def over_quota(rows: int, owner_rows: int, bound: int, rows_per_second: float) -> QuotaExceeded:
    """The problem of a job of `rows` whose owner has `owner_rows` of `bound` in the backlog."""
    return QuotaExceeded(
        f"{owner_rows} rows of noise are waiting for this key, which may have {bound} at once; "
        f"there is no room for {rows} more.",
        retry_after=retry_seconds(owner_rows, rows_per_second),
        limit=bound,
    )
