"""The engine's contract: the job queue between admission and the workers.

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
"""Failed attempts of one shard; the last of them ends the job."""

ISOLATED_CRASHES_ALLOWED = 5
"""Worker crashes on one shard after its isolation; the last of them ends the job."""

MOST_RESULT_BYTES = 4 * 2**20
"""Largest result of a shard."""

RETRY_SECONDS = 10
"""Retry-After where no speed has been measured yet, or no worker is alive."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as it announces itself with every pull.

    `bundles` maps task to served digest. `numerics` are those of the digests: with them, a process
    that has a task's bundle checks whether a digest belongs to that bundle.
    """

    id: str
    bundles: Mapping[str, str]
    numerics: Sequence[Mapping[str, Any]] = ()

    def announcement(self) -> bytes:
        """The announced bundles and numerics, as canonical JSON."""
        return canonical_json({"bundles": self.bundles, "numerics": list(self.numerics)})


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard that one worker holds until the lease expires; `token` names this delivery.

    An `isolated` shard crashed a worker: it is pulled alone and never shares a device batch.
    """

    job: Job
    shard: Shard
    token: str
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """The load of the engine, and the digests of its live workers.

    - `backlog_rows`: rows that wait or are leased.
    - `rows_per_second`: measured over the last minute of work; 0.0 before the first commit.
    - `digests`: digests by task of the live workers, those of most workers first.
    - `owner_rows`: the part of the backlog that belongs to the requested owner.
    - `numerics`: all that live workers announce.
    """

    backlog_rows: int
    rows_per_second: float
    digests: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    owner_rows: int = 0
    numerics: tuple[Mapping[str, Any], ...] = ()

    def digests_of(self, task: str, bundle: Bundle) -> tuple[str, ...]:
        """The digests under which live workers serve this bundle, those of most workers first.

        A bundle of the same name with other labels or weights has other digests.
        """
        own = {bundle.served_digest(numerics) for numerics in self.numerics}
        return tuple(digest for digest in self.digests.get(task, ()) if digest in own)


@dataclass(frozen=True, slots=True)
class PriorityState:
    """The load of one priority.

    `rows` wait or are leased. `oldest_seconds` is the time since the job of the oldest shard
    without a lease was accepted; 0.0 where no shard waits.
    """

    rows: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The queue's figures for the operator.

    - `priorities`: state of `hi` and of `lo`.
    - `rows_per_second`: as in Capacity.
    - `workers`: number of live workers.
    - `dead_letters`: shards that ended their jobs, until the engine drops the last of them.
    - `persists`: whether the engine's last write to disk succeeded; None where the engine writes
      nothing or does not report it.
    """

    priorities: Mapping[str, PriorityState]
    rows_per_second: float
    workers: int
    dead_letters: int
    persists: bool | None = None


class Engine(Protocol):
    """The job queue: accepts jobs, leases their shards to workers, counts every shard once.

    The engine takes an expired lease back at its next sweep (at any pull); until then its worker
    may still renew or commit it. Jobs under a digest that no live worker has announced for
    some minutes fail. While no worker announces anything, they wait.

    A job without looks ends at its last commit. A job with looks has its first round queued, and
    is due once every shard of the round is counted. Any process may then extend it by the next
    round, or finish it; the engine does not end it, not even after the last look. A cascade has a
    round a stage, and each begins its selection votes from zero.
    """

    async def submit(
        self, job: Job, *, idempotency_key: str | None = None, fingerprint: str = ""
    ) -> str:
        """The id of the queued job, or of the earlier job of the same `idempotency_key`.

        `idempotency_key` belongs to the job's owner and lives as long as its job.

        Raises Backlog (503) where the backlog would exceed its limit in rows, or no live worker
        serves the job's bundle; QuotaExceeded (429) where the owner's part of the backlog would
        exceed the owner's limit; InvalidField (422) where the job alone exceeds either limit;
        IdempotencyMismatch (422) where the key belongs to another fingerprint.
        """

    async def pull(self, worker: Worker, rows: int, prefer_task: str | None = None) -> list[Lease]:
        """Shards of one task and bundle of the worker's, oldest first, `hi` priority first.

        - Stops at the shard that reaches `rows`; waits a moment where no shard waits.
        - Where `lo` waits, one pull in four begins there.
        - `prefer_task` goes first, unless another task has starved.
        - An isolated shard comes alone.
        - A pull of 0 rows only announces the worker, and returns at once.
        """

    async def start(self, leases: Sequence[Lease]) -> list[Lease]:
        """Mark these shards as being computed, so that a worker crash counts against them.

        Extends the leases and returns those still held, as `renew` does.
        """

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """The leases still held, extended; a cancelled or lost one is missing."""

    async def commit(self, lease: Lease, counts: Sequence[int], result: bytes = b"") -> bool:
        """Add a shard's votes (K,) once; False where the shard was counted or the job has ended.

        The first commit of a shard counts, even on a lease lost to another worker. A demonstration
        has a `result` beside its votes. The engine keeps as many results as its options allow: a
        new one erases the oldest job with a result.

        Raises ValueError for counts that cannot be the votes of the shard's rows, and for a result
        of more than MOST_RESULT_BYTES.
        """

    async def fail(self, lease: Lease, problem: Mapping[str, Any]) -> None:
        """Report a failed attempt; the third ends the job with `problem`. Ignores a lost lease."""

    async def release(self, leases: Sequence[Lease]) -> None:
        """Hand shards back uncomputed and uncounted, as a draining worker does."""

    async def due(self) -> list[JobStatus]:
        """The jobs whose look is due, oldest first, without pixels; waits a moment where none is.

        A job is due until it is extended or finished. Several processes may get the same jobs.
        """

    async def extend(self, job_id: str, rows: int) -> bool:
        """Queue the round that ends at the look of `rows` estimation rows.

        Only where the look before it is due. The round goes before younger jobs that have not
        begun. True also where an earlier call queued the round and the job is open.
        """

    async def finish(self, job_id: str, look: int) -> bool:
        """End a job as succeeded with the votes at the look of `look` estimation rows.

        Only where that look is due, or is the last one that the job was extended past; the rest of
        the job's rows is dropped. True also where the job had succeeded.
        """

    async def cancel(self, job_id: str) -> bool:
        """Drop the rest of a job; False where it had ended or is unknown."""

    async def delete(self, job_id: str) -> bool:
        """Cancel a job and erase it, image and all; False where it is unknown."""

    def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        """The job's status now and at every change, up to the final one; nothing if unknown.

        A slow reader sees the latest status only. Where the engine loses the job meanwhile, the
        iterator ends without a final status.
        """

    async def status(self, job_id: str) -> JobStatus | None:
        """The job's status, or None; while the job runs, votes are those committed.

        The status's job may lack its pixels, which are erased at its end.
        """

    async def name(self, job_id: str, alias: str) -> None:
        """Let `named` find the job by this alias, for as long as the engine has the job.

        Several jobs may have the same alias. An unknown job changes nothing.
        """

    async def named(self, alias: str) -> str | None:
        """The id of a job with this alias, or None once all of them are gone."""

    async def capacity(self, owner: str | None = None) -> Capacity:
        """Backlog, one owner's part of it, measured speed, and the digests of live workers."""

    async def stats(self) -> EngineStats:
        """The queue's figures for the operator; meant for a few calls a minute."""

    async def close(self) -> None:
        """Release every connection."""


def checked_counts(lease: Lease, counts: Sequence[int], result: bytes) -> list[int]:
    """The counts (K,) as integers.

    Raises ValueError unless there is one count >= 0 per class and they sum to the shard's rows, and
    for a result of more than MOST_RESULT_BYTES.
    """
    votes = [int(count) for count in counts]
    if len(votes) != lease.job.classes:
        raise ValueError(f"{len(votes)} counts for {lease.job.classes} classes")
    if min(votes) < 0:
        raise ValueError(f"a count is negative: {min(votes)}")
    if sum(votes) != lease.shard.rows:
        raise ValueError(f"counts of {sum(votes)} rows for a shard of {lease.shard.rows}")
    if len(result) > MOST_RESULT_BYTES:
        raise ValueError(f"a result of {len(result)} bytes; at most {MOST_RESULT_BYTES}")
    return votes


def died_over(job_id: str) -> dict[str, Any]:
    """The problem document of a job whose shard crashed too many workers."""
    detail = f"Workers crashed {ISOLATED_CRASHES_ALLOWED + 1} times on the same rows."
    return ShardDead(detail, job=job_id).document()


def abandoned(job_id: str) -> dict[str, Any]:
    """The problem document of a job under a digest that no worker serves any more."""
    detail = "No worker serves the networks that began this job any more; ask again."
    return ShardDead(detail, job=job_id).document()


def rows_per_second(rows: int, seconds: float) -> float:
    """The speed over `seconds` of work; 0.0 where no row was counted."""
    return rows / max(seconds, 0.001)


def retry_seconds(rows: int, rows_per_second: float) -> int:
    """Retry-After in whole seconds (>= 1): how long `rows` take at the measured speed."""
    if rows_per_second <= 0:
        return RETRY_SECONDS
    return max(1, math.ceil(rows / rows_per_second))
