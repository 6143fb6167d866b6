"""The door's rules, written once for every engine: who is let in, and what the others are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from service.engine.protocol import RETRY_SECONDS, retry_seconds
from service.errors import Backlog, IdempotencyMismatch, InvalidField, QuotaExceeded, as_json
from service.jobs import Job, canonical_json

Served = Counter[tuple[str, str]]
"""How many live workers serve a task under a digest."""


def served_digests(served: Served) -> Mapping[str, tuple[str, ...]]:
    """Every served task with its digests, those of most workers first; equal ones go by name."""
    found: dict[str, tuple[str, ...]] = {}
    for (task, digest), _ in sorted(
        served.items(), key=lambda item: (item[1], item[0]), reverse=True
    ):
        found[task] = (*found.get(task, ()), digest)
    return found


def distinct(numerics: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The numerics without repeats, in an order of their own."""
    known = {canonical_json(described): described for described in numerics}
    return tuple(known[text] for text in sorted(known))


def another_request() -> IdempotencyMismatch:
    """The refusal of a key that came before with another fingerprint."""
    return IdempotencyMismatch("This Idempotency-Key came before with another request.")


def most_rows(owner: str | None, max_rows: int, max_rows_per_key: int | None) -> int:
    """The bound in rows of one job: the backlog's, or its owner's where that is less."""
    if owner is None or max_rows_per_key is None:
        return max_rows
    return min(max_rows, max_rows_per_key)


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


def served_otherwise(task: str) -> Backlog:
    """The refusal of a job where live workers have another bundle under its task's name."""
    return Backlog(
        f"Live workers have another bundle of task {as_json(task)} than this process, so "
        "their votes are not about its labels. Give all processes the same tasks and the same "
        "release.",
        retry_after=RETRY_SECONDS,
    )


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
