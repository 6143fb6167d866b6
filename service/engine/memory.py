"""The in-process engine of the embedded default: one event loop, nothing on disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.engine.limits import another_request, distinct, served_digests
from service.engine.memory_jobs import MemoryJobs, steady_time
from service.engine.options import EngineOptions
from service.engine.protocol import Capacity, EngineStats, Lease, Worker, checked_counts
from service.engine.signal import notified
from service.errors import TaskUnusable
from service.jobs import Job, JobStatus, Mode, State


class MemoryEngine(MemoryJobs):
    """The engine in one process: the contract of Engine, as long as the process lives.

    For use from one event loop. An idle pull waits `poll_seconds`. The image of a job is dropped
    when the job ends. Jobs that no worker serves fail with the last problem that a worker reported
    of them. While no worker announces anything, they wait.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        poll_seconds: float = 0.5,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        super().__init__(options, clock)
        self._poll_seconds = poll_seconds

    async def submit(
        self, job: Job, *, idempotency_key: str | None = None, fingerprint: str = ""
    ) -> str:
        """Queue a job; see Engine. A known job id changes nothing."""
        self._sweep()
        caller_key = None if idempotency_key is None else (job.owner, idempotency_key)
        if caller_key is not None and (earlier := self._caller_keys.get(caller_key)):
            if earlier.fingerprint != fingerprint:
                raise another_request()
            return earlier.job.id
        if self._find(job.id) is None:
            self._backlog.admit(job, self._served(), self._rate.rows_per_second)
            self._enqueue(job, caller_key, fingerprint)
        return job.id

    async def pull(self, worker: Worker, rows: int, prefer_task: str | None = None) -> list[Lease]:
        """Lease shards to a worker, waiting `poll_seconds` at most; see Engine."""
        deadline = asyncio.get_running_loop().time() + self._poll_seconds
        while True:
            arrival = self._arrived.next
            leases = self._take(worker, rows, prefer_task)
            if leases or not rows or not await notified(arrival, deadline):
                return leases

    async def start(self, leases: Sequence[Lease]) -> list[Lease]:
        """Mark these shards as being computed; see Engine."""
        for delivery in self._deliveries(leases):
            delivery.started = True
            self._run(delivery.record)
        return await self.renew(leases)

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Extend the leases; returns those still held."""
        deliveries = self._deliveries(leases)
        for delivery in deliveries:
            delivery.expires = self._clock() + self._options.lease_seconds
        return [delivery.lease for delivery in deliveries]

    async def commit(self, lease: Lease, counts: Sequence[int], result: bytes = b"") -> bool:
        """Add a shard's votes once; see Engine."""
        votes = checked_counts(lease, counts, result)
        self._deliveries([lease])  # Renews the worker, which is alive.
        record = self._open.get(lease.job.id)
        if record is None or lease.shard.index in record.counted:
            return False
        self._run(record)
        if result:
            self._keep_result(record, result)
        self._count(record, lease.shard.index, votes)
        return True

    async def fail(self, lease: Lease, problem: Mapping[str, Any]) -> None:
        """Report a failed attempt; see Engine."""
        for delivery in self._deliveries([lease]):
            delivery.record.failures[lease.shard.index] += 1
            if str(problem.get("type")).endswith(f":{TaskUnusable.slug}"):
                delivery.record.reported = dict(problem)
            self._settle(delivery, problem)

    async def release(self, leases: Sequence[Lease]) -> None:
        """Hand shards back uncomputed and uncounted."""
        for delivery in self._deliveries(leases):
            self._put_back(delivery)

    async def due(self) -> list[JobStatus]:
        """The jobs whose look is due, waiting `poll_seconds` at most; see Engine."""
        deadline = asyncio.get_running_loop().time() + self._poll_seconds
        while True:
            change = self._look_due.next
            self._sweep()
            found = [record.status() for record in self._open.values() if record.due]
            if found or not await notified(change, deadline):
                return [replace(each, job=replace(each.job, pixels=b"")) for each in found]

    async def extend(self, job_id: str, rows: int) -> bool:
        """Queue the round that ends at the look of `rows`; see Engine."""
        self._sweep()
        record = self._open.get(job_id)
        if record is None or rows not in record.job.looks[1:]:
            return False
        at = record.job.looks.index(rows)
        if record.due and at == record.round + 1:
            record.extend(record.job.rounds(self._options.shard_rows)[at])
            self._arrived.notify()
            record.changed.notify()
        return at <= record.round

    async def finish(self, job_id: str, look: int) -> bool:
        """End a job with the votes at a look; see Engine."""
        self._sweep()
        record = self._find(job_id)
        if record is None:
            return False
        if not record.state.ended and record.return_to(look):
            self._end(record, State.SUCCEEDED)
        return record.state is State.SUCCEEDED

    async def cancel(self, job_id: str) -> bool:
        """Drop the rest of a job; False where it had ended or is unknown."""
        self._sweep()
        record = self._open.get(job_id)
        if record is None:
            return False
        self._end(record, State.CANCELLED)
        return True

    async def delete(self, job_id: str) -> bool:
        """Cancel a job and erase it, image and all; False where it is unknown."""
        self._sweep()
        record = self._find(job_id)
        if record is None:
            return False
        self._erase(record)
        return True

    async def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        """The job's status now and at every change; see Engine."""
        self._sweep()
        record = self._find(job_id)
        while record is not None:
            change = record.changed.next
            status = record.status()
            yield status
            if status.state.ended:
                return
            await change.wait()

    async def status(self, job_id: str) -> JobStatus | None:
        """The job's status, or None."""
        self._sweep()
        record = self._find(job_id)
        return None if record is None else record.status()

    async def name(self, job_id: str, alias: str) -> None:
        """Let `named` find the job by this alias; see Engine."""
        self._sweep()
        if record := self._find(job_id):
            record.aliases.add(alias)
            self._aliases.setdefault(alias, {})[job_id] = record

    async def named(self, alias: str) -> str | None:
        """The id of the job with this alias, or None."""
        self._sweep()
        return next(reversed(self._aliases.get(alias, {})), None)

    async def capacity(self, owner: str | None = None) -> Capacity:
        """Backlog, one owner's part of it, measured speed, and the digests of live workers."""
        self._sweep()
        served = self._served()
        return Capacity(
            backlog_rows=self._backlog.rows,
            rows_per_second=self._rate.rows_per_second,
            digests=served_digests(served),
            owner_rows=self._backlog.of(owner),
            numerics=distinct(
                each for worker, _ in self._workers.values() for each in worker.numerics
            ),
        )

    async def stats(self) -> EngineStats:
        """The queue's figures for the operator; see Engine."""
        self._sweep()
        priorities = {mode.priority: self._priority_state(mode.priority) for mode in Mode}
        speed = self._rate.rows_per_second
        return EngineStats(priorities, speed, len(self._workers), self._dead_letters)

    async def close(self) -> None:
        """Nothing to release: the jobs end with the process."""
