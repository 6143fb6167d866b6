"""The engine's contract: what stands between the door and the workers.

Every implementation passes tests/integration/engine/test_conformance.py: leases, attempts, dead
letters, a bounded backlog.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.bundle import Bundle
from service.errors import ShardDead
from service.jobs import Job, JobStatus, Shard, canonical_json

FAILURES_ALLOWED = 3
"""The failed attempt of one shard that ends its job."""

ISOLATED_CRASHES_ALLOWED = 5
"""The death of a worker over one isolated shard that ends its job; one death made it isolated."""

RETRY_SECONDS = 10
"""Retry-After where no speed has been measured yet, or no worker is alive."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as it announces itself with every pull.

    `bundles` maps task to served digest. `numerics` are those that the digests were made with:
    who has a task's bundle can tell by them whether a digest is that bundle's.
    """

    id: str
    bundles: Mapping[str, str]
    numerics: Sequence[Mapping[str, Any]] = ()

    def announcement(self) -> bytes:
        """What it announces, as canonical JSON."""
        return canonical_json({"bundles": self.bundles, "numerics": list(self.numerics)})


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard handed to one worker until the lease runs out; `token` is this delivery's own.

    A worker died over a `isolated` shard: it is pulled alone and never shares a device batch.
    """

    job: Job
    shard: Shard
    token: str
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine can take.

    `backlog_rows` wait or are leased; `rows_per_second` is measured over the last minute of work
    (0.0 before the first commit); `digests` maps every task of a live worker to the digests it is
    served under, those of most workers first, and `numerics` are all that workers announce. Of the
    backlog, `owner_rows` belong to the owner asked about.
    """

    backlog_rows: int
    rows_per_second: float
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    owner_rows: int = 0
    numerics: tuple[Mapping[str, Any], ...] = ()

    def digests_of(self, task: str, bundle: Bundle) -> tuple[str, ...]:
        """The digests under which live workers serve this very bundle, those of most first.

        A bundle of the same name with other words or weights has other digests.
        """
        own = {bundle.served_digest(numerics) for numerics in self.numerics}
        return tuple(digest for digest in self.digests.get(task, ()) if digest in own)


@dataclass(frozen=True, slots=True)
class PriorityState:
    """What one priority holds.

    `rows` wait or are leased; `oldest_seconds` is the age, since its job was accepted, of the
    oldest shard that no worker holds: 0.0 where there is none.
    """

    rows: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an operator watches; `priorities` has `hi` and `lo`.

    `rows_per_second` is Capacity's; `workers` are alive; `dead_letters` counts the shards that
    ended their jobs, for as long as the engine remembers the last of them. `persists`: whether
    what the engine last wrote to disk got there, None where it writes nothing or does not tell.
    """

    priorities: Mapping[str, PriorityState]
    rows_per_second: float
    workers: int
    dead_letters: int
    persists: bool | None = None


class Engine(Protocol):
    """Takes jobs in, hands their shards to workers, and counts every shard exactly once.

    A lease that ran out is taken back when the engine next looks (at any pull); until then its
    holder may still renew or commit it. Jobs under a digest that no live worker has announced for
    some minutes fail; while no worker announces anything they wait.
    """

    async def submit(
        self, job: Job, *, idempotency_key: str | None = None, fingerprint: str = ""
    ) -> str:
        """Queue a job and return its id, or that of the job which the key made before.

        `idempotency_key` belongs to the job's owner and lives as long as its job. Raises Backlog
        (503) when the backlog would pass its bound in rows or no live worker serves the job's
        bundle, QuotaExceeded (429) when its owner's part of the backlog would pass the owner's
        bound, InvalidField (422) when the job alone is larger than either bound, and
        IdempotencyMismatch (422) when the key came with another fingerprint.
        """

    async def pull(self, worker: Worker, rows: int, prefer_task: str | None = None) -> list[Lease]:
        """Shards of one task and bundle of the worker's, oldest first, `hi` priority first.

        Where `lo` waits, one pull in four begins there. Stops at the shard that reaches `rows`;
        waits a moment when there is none. The preferred task goes first unless another has
        gone unserved too long. An isolated shard comes alone. A pull of no rows only announces the
        worker, and returns at once.
        """

    async def start(self, leases: Sequence[Lease]) -> list[Lease]:
        """Say that these shards are being computed: a death from here on counts against them.

        Extends the leases and returns those still held, as `renew` does.
        """

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Extend the leases; returns those still held (a cancelled or lost one is missing)."""

    async def commit(self, lease: Lease, counts: Sequence[int]) -> bool:
        """Add a shard's votes (K,) once; False where the shard was counted or the job is over.

        The first commit of a shard is counted, even on a lease lost to another worker. Raises
        ValueError for counts that cannot be the votes of the shard's rows.
        """

    async def fail(self, lease: Lease, problem: Mapping[str, Any]) -> None:
        """Report a failed attempt; the third ends the job with `problem`. A lost lease: nothing."""

    async def release(self, leases: Sequence[Lease]) -> None:
        """Hand shards back uncomputed and uncounted, as a draining worker does."""

    async def cancel(self, job_id: str) -> bool:
        """Drop what is left of a job; False where it had ended or is unknown."""

    async def delete(self, job_id: str) -> bool:
        """Cancel a job and erase it, image and all; False where it is unknown."""

    def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        """The job's status now and at every change, ending with its last; unknown: nothing.

        A slow reader sees the latest status only. Where the engine loses the job meanwhile it ends
        with a status that is not the last.
        """

    async def status(self, job_id: str) -> JobStatus | None:
        """The job's status, or None; while it runs the votes are the tally so far.

        The job in it may lack its pixels, which are erased once it has ended.
        """

    async def capacity(self, owner: str | None = None) -> Capacity:
        """Backlog, that of one owner, measured speed, and what live workers serve."""

    async def stats(self) -> EngineStats:
        """How things stand in the queue, for whoever watches it; for a few calls a minute."""

    async def close(self) -> None:
        """Let go of every connection."""


def checked_counts(lease: Lease, counts: Sequence[int]) -> list[int]:
    """The counts (K,) as integers.

    Raises ValueError where they are not one count >= 0 a class summing to the shard's rows.
    """
    votes = [int(count) for count in counts]
    if len(votes) != lease.job.classes:
        raise ValueError(f"{len(votes)} counts for {lease.job.classes} classes")
    if min(votes) < 0:
        raise ValueError("counts are negative")
    if sum(votes) != lease.shard.rows:
        raise ValueError(f"counts of {sum(votes)} rows for a shard of {lease.shard.rows}")
    return votes


def died_over(job_id: str) -> dict[str, Any]:
    """The problem document of a job that ends by the deaths of its workers."""
    detail = "Workers died over the same rows again and again."
    return ShardDead(detail, job=job_id).document()


def abandoned(job_id: str) -> dict[str, Any]:
    """The problem document of a job under a digest that workers have ceased to serve."""
    detail = "No worker serves the networks that began this job any more; ask again."
    return ShardDead(detail, job=job_id).document()


def rows_per_second(rows: int, seconds: float) -> float:
    """The speed measured over `seconds` of work; 0.0 where no row was counted."""
    return rows / max(seconds, 0.001)


def retry_seconds(rows: int, rows_per_second: float) -> int:
    """Retry-After in whole seconds (>= 1): how long `rows` take at the measured speed."""
    if rows_per_second <= 0:
        return RETRY_SECONDS
    return max(1, math.ceil(rows / rows_per_second))
