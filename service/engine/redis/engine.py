"""Engine of a fleet: Redis >= 7.0 Streams between any number of processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from redis.asyncio import Redis

from service.config import Settings
from service.engine.limits import distinct, most_rows, served_digests
from service.engine.options import EngineOptions
from service.engine.protocol import (
    Capacity,
    EngineStats,
    Lease,
    PriorityState,
    Worker,
    checked_counts,
    rows_per_second,
)
from service.engine.redis.client import Scripts, answered, connect, persists
from service.engine.redis.codec import (
    caller_digest,
    flat,
    job_status,
    line_of,
    lost,
    named,
    numerics_of,
    pairs,
    rejection,
    script_terms,
    served,
)
from service.engine.redis.puller import Puller
from service.engine.redis.reconciler import BackgroundReconciler, reconcile
from service.engine.redis.subscriber import Subscriber
from service.engine.signal import notified
from service.jobs import Job, JobStatus, State, canonical_json

PREFIX = "{vouchsafe}:"
"""Prefix of every key and channel; the braces keep all keys in one slot of a cluster."""

_STEADY_POLL_SECONDS = 10.0


class RedisEngine:
    """The engine over one Redis; every process with the same settings shares its work.

    Each method runs one Lua script or a few, so a process may crash between any two steps. Leases
    are the group's pending entries, renewed by XCLAIM JUSTID.

    - `poll_seconds`: an idle pull waits for it; a watch polls at it while the subscriber is down,
      and every 10 s otherwise.
    - `sweep_seconds`: time between two sweeps, of all processes together.
    - `prefix`: begins every key and channel.
    - `clock`: for tests, the time that scripts write; otherwise Redis's.

    Methods raise redis.exceptions.RedisError once Redis has been unreachable for some seconds.
    """

    def __init__(
        self,
        redis: Redis,
        options: EngineOptions,
        *,
        poll_seconds: float = 1.0,
        sweep_seconds: float = 1.0,
        prefix: str = PREFIX,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._redis = redis
        self._prefix = prefix
        self._options = options
        self._poll_seconds = poll_seconds
        self._scripts = Scripts(redis, prefix, script_terms(options, sweep_seconds), clock)
        self._subscriber = Subscriber(redis, f"{prefix}arrived")
        self._puller = Puller(redis, self._scripts, prefix, options.starvation_seconds)
        self._reconciler = BackgroundReconciler(
            redis, f"{prefix}reconciled", options.lease_seconds, lambda: self.reconcile()
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The engine that VOUCHSAFE_REDIS_URL and the other settings name.

        Raises ValueError where no URL is set.
        """
        if settings.redis_url is None:
            raise ValueError("VOUCHSAFE_REDIS_URL is not set")
        redis = connect(settings.redis_url.get_secret_value())
        return cls(redis, EngineOptions.from_settings(settings))

    async def submit(
        self, job: Job, *, idempotency_key: str | None = None, fingerprint: str = ""
    ) -> str:
        """Queue a job; see Engine. A known job id changes nothing."""
        key = None if idempotency_key is None else caller_digest(job.owner, idempotency_key)
        queue = line_of(job.task, job.bundle)
        shards = flat(job.rounds(self._options.shard_rows)[0])
        limit = most_rows(
            job.owner, self._options.max_queue_rows, self._options.max_queue_rows_per_key
        )
        outcome, *figures = await self._scripts.run(
            "submit", job.encode(), job.pixels, key or "", fingerprint, queue, limit, *shards
        )
        if problem := rejection(job, limit, outcome, figures):
            raise problem
        return str(figures[0].decode())

    async def pull(self, worker: Worker, rows: int, prefer_task: str | None = None) -> list[Lease]:
        """Lease shards to a worker, waiting `poll_seconds` at most; see Engine."""
        deadline = asyncio.get_running_loop().time() + self._poll_seconds
        self._reconciler.start_if_due()
        while True:
            arrival = self._subscriber.always.next
            leases = await self._puller.take(worker, rows, prefer_task)
            if leases or not rows:
                return leases
            if not await notified(arrival, deadline):
                return []

    async def start(self, leases: Sequence[Lease]) -> list[Lease]:
        """Mark these shards as being computed; see Engine."""
        return await self._renew("start", leases)

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Extend the leases; returns those still held."""
        return await self._renew("", leases)

    async def commit(self, lease: Lease, counts: Sequence[int], result: bytes = b"") -> bool:
        """Add a shard's votes once; see Engine."""
        votes = checked_counts(lease, counts, result)
        shard = lease.shard
        nonzero = [figure for item in enumerate(votes) if item[1] for figure in item]
        counted = await self._scripts.run(
            "commit",
            *named([lease]),
            shard.domain.value,
            shard.rows,
            json.dumps(lost("record", lease.job.id)),
            result,
            *nonzero,
        )
        return bool(counted)

    async def fail(self, lease: Lease, problem: Mapping[str, Any]) -> None:
        """Report a failed attempt; see Engine."""
        await self._scripts.run("fail", *named([lease]), canonical_json(dict(problem)))

    async def release(self, leases: Sequence[Lease]) -> None:
        """Hand shards back uncomputed and uncounted."""
        if leases:
            await self._scripts.run("release", *named(leases))

    async def due(self) -> list[JobStatus]:
        """The jobs whose look is due, waiting `poll_seconds` at most; see Engine."""
        deadline = asyncio.get_running_loop().time() + self._poll_seconds
        async with self._subscriber.listening(f"{self._prefix}due") as signal:
            while True:
                change = signal.next
                names = await self._scripts.run("due")
                statuses = await asyncio.gather(*(self.status(name.decode()) for name in names))
                found = [status for status in statuses if status is not None and status.due]
                if found or not await notified(change, deadline):
                    return found

    async def extend(self, job_id: str, rows: int) -> bool:
        """Queue the round that ends at the look of `rows`; see Engine."""
        fields = pairs(await self._scripts.run("status", job_id))
        job = Job.decode(fields[b"job"], b"") if fields else None
        if job is None or rows not in job.looks[1:]:
            return False
        at = job.looks.index(rows)
        shards = flat(job.rounds(int(fields[b"shard_rows"]))[at])
        return bool(await self._scripts.run("extend", job_id, job.looks[at - 1], rows, *shards))

    async def finish(self, job_id: str, look: int) -> bool:
        """End a job with the votes at a look; see Engine."""
        return bool(await self._scripts.run("finish", job_id, look))

    async def cancel(self, job_id: str) -> bool:
        """Drop the rest of a job; False where it had ended or is unknown."""
        return bool(await self._scripts.run("end", job_id, State.CANCELLED.value, ""))

    async def delete(self, job_id: str) -> bool:
        """Cancel a job and erase it, image and all; False where it is unknown."""
        return bool(await self._scripts.run("delete", job_id))

    async def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        """The job's status now and at every change; see Engine."""
        last = None
        async with self._subscriber.listening(f"{self._prefix}changed:{job_id}") as signal:
            while True:
                change = signal.next
                status = await self.status(job_id)
                if status is None and last is not None and await self._was_cancelled(job_id):
                    status = replace(last, state=State.CANCELLED, finished=time.time())
                if status is None:
                    return
                if status != last:
                    yield status
                if status.state.ended:
                    return
                last = status
                wait = self._poll_seconds
                if self._subscriber.steady:
                    wait = max(wait, _STEADY_POLL_SECONDS)
                await notified(change, asyncio.get_running_loop().time() + wait)

    async def status(self, job_id: str) -> JobStatus | None:
        """The job's status, or None; its job has no pixels."""
        fields = pairs(await self._scripts.run("status", job_id))
        return job_status(fields) if fields else None

    async def name(self, job_id: str, alias: str) -> None:
        """Let `named` find the job by this alias; see Engine."""
        await self._scripts.run("name", job_id, alias)

    async def named(self, alias: str) -> str | None:
        """The id of the job with this alias, or None."""
        job_id = await self._scripts.run("named", alias)
        return None if job_id is None else str(job_id.decode())

    async def capacity(self, owner: str | None = None) -> Capacity:
        """Backlog, one owner's part of it, measured speed, and the digests of live workers."""
        arguments = () if owner is None else (owner,)
        reply = await self._scripts.run("capacity", *arguments)
        backlog_rows, (rows, seconds), announcements, owner_rows = reply
        return Capacity(
            backlog_rows=int(backlog_rows),
            rows_per_second=rows_per_second(int(rows), float(seconds)),
            digests=served_digests(served(announcements)),
            owner_rows=int(owner_rows),
            numerics=distinct(numerics_of(announcements)),
        )

    async def stats(self) -> EngineStats:
        """The queue's figures for the operator; see Engine."""
        (fast, slow), (rows, seconds), workers, dead = await self._scripts.run("stats")
        return EngineStats(
            priorities={
                name: PriorityState(int(state[0]), float(state[1]))
                for name, state in (("hi", fast), ("lo", slow))
            },
            rows_per_second=rows_per_second(int(rows), float(seconds)),
            workers=int(workers),
            dead_letters=int(dead),
            persists=await persists(self._redis),
        )

    async def reconcile(self) -> int:
        """Queue lost shards of open jobs again, and return their number.

        Jobs that no worker has served for `unserved_seconds` fail. Any process may call this at
        any time: a shard delivered twice is counted once.
        """
        return await reconcile(self._scripts)

    async def close(self) -> None:
        """Release every connection."""
        await self._reconciler.close()
        await self._subscriber.close()
        await self._scripts.close()
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _was_cancelled(self, job_id: str) -> bool:
        """Whether a deleted job was cancelled lately, and not lost."""
        return bool(await answered(self._redis.exists(f"{self._prefix}cancelled:{job_id}")))

    async def _renew(self, how: str, leases: Sequence[Lease]) -> list[Lease]:
        if not leases:
            return []
        held = await self._scripts.run("renew", how, *named(leases))
        return [leases[place] for place in held]
