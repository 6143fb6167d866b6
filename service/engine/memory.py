"""The in-process engine of the embedded default: one event loop, nothing on disk."""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import insort
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.engine.limits import Served, another_request, distinct, served_digests
from service.engine.memory_state import BacklogRows, CallerKey, JobRecord, RateMeter
from service.engine.options import EngineOptions
from service.engine.protocol import (
    Capacity,
    EngineStats,
    Lease,
    PriorityState,
    Worker,
    abandoned,
    checked_counts,
    died_over,
)
from service.engine.queues import Queues
from service.engine.signal import Signal
from service.errors import TaskUnusable
from service.jobs import Domain, Job, JobStatus, Mode, State


@dataclass(slots=True, eq=False)
class _Delivery:
    """A live lease: its worker, its expiry, and whether the worker computes the shard."""

    record: JobRecord
    lease: Lease
    worker: Worker
    expires: float
    started: bool = False


_EPOCH = time.time() - time.monotonic()


def steady_time() -> float:
    """Unix seconds, counted monotonically from the process's start: no clock step ends a lease."""
    return _EPOCH + time.monotonic()


class MemoryEngine:
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
        self._options = options
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._open: dict[str, JobRecord] = {}  # by submission
        self._ended: dict[str, JobRecord] = {}  # by end
        self._queues = Queues()
        self._held: dict[tuple[str, int], _Delivery] = {}
        self._workers: dict[str, tuple[Worker, float]] = {}
        self._caller_keys: dict[CallerKey, JobRecord] = {}
        self._aliases: dict[str, JobRecord] = {}
        self._backlog = BacklogRows(options.max_queue_rows, options.max_queue_rows_per_key)
        self._dead_letters = 0
        self._rate = RateMeter()
        self._arrived = Signal()

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
            if leases or not rows:
                return leases
            try:
                async with asyncio.timeout_at(deadline):
                    await arrival.wait()
            except TimeoutError:
                return []

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

    async def commit(self, lease: Lease, counts: Sequence[int]) -> bool:
        """Add a shard's votes once; see Engine."""
        votes = checked_counts(lease, counts)
        self._deliveries([lease])  # Renews the worker, which is alive.
        record = self._open.get(lease.job.id)
        if record is None or lease.shard.index in record.counted:
            return False
        self._run(record)
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
            self._aliases[alias] = record

    async def named(self, alias: str) -> str | None:
        """The id of the job with this alias, or None."""
        self._sweep()
        record = self._aliases.get(alias)
        return None if record is None else record.job.id

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

    def _priority_state(self, priority: str) -> PriorityState:
        now = self._clock()
        records = self._queues.priority(priority)
        waiting = (now - record.submitted for record in records if record.waiting)
        rows = sum(record.job.charge - record.rows_done for record in records)
        return PriorityState(rows, max(waiting, default=0.0))

    def _find(self, job_id: str) -> JobRecord | None:
        return self._open.get(job_id) or self._ended.get(job_id)

    def _deliveries(self, leases: Sequence[Lease]) -> list[_Delivery]:
        """The live ones of these leases; renews the workers that hold them."""
        found = []
        for lease in leases:
            delivery = self._held.get((lease.job.id, lease.shard.index))
            if delivery is not None and delivery.lease.token == lease.token:
                worker, _ = self._workers.get(delivery.worker.id, (delivery.worker, 0.0))
                self._workers[worker.id] = (worker, self._clock())
                found.append(delivery)
        return found

    def _served(self) -> Served:
        return Counter(
            item for worker, _ in self._workers.values() for item in worker.bundles.items()
        )

    def _enqueue(self, job: Job, caller_key: CallerKey | None, fingerprint: str) -> None:
        shards = job.shards(self._options.shard_rows)
        record = JobRecord(
            job=job,
            shards=shards,
            submitted=self._clock(),
            caller_key=caller_key,
            fingerprint=fingerprint,
            waiting=list(range(len(shards))),
            votes={domain: [0] * job.classes for domain in Domain},
        )
        if self._backlog.rows == 0:
            self._rate.work_begins(record.submitted)
        self._backlog.book(job, job.charge)
        self._open[job.id] = record
        if caller_key is not None:
            self._caller_keys[caller_key] = record
        self._queues.add(record)
        self._arrived.notify()

    def _take(self, worker: Worker, rows: int, prefer_task: str | None) -> list[Lease]:
        self._sweep()
        now = self._clock()
        self._workers[worker.id] = (worker, now)
        if not rows:
            return []
        queue = self._queues.next_for(worker, prefer_task, self._options.starvation_seconds, now)
        if queue is None:
            return []
        queue.served = now
        return [self._lease(record, index, worker) for record, index in queue.take(rows)]

    def _lease(self, record: JobRecord, index: int, worker: Worker) -> Lease:
        lease = Lease(
            record.job, record.shards[index], secrets.token_hex(16), record.isolated(index)
        )
        expires = self._clock() + self._options.lease_seconds
        self._held[record.job.id, index] = _Delivery(record, lease, worker, expires)
        return lease

    def _run(self, record: JobRecord) -> None:
        if record.state is State.QUEUED:
            record.state, record.started = State.RUNNING, self._clock()
            record.changed.notify()

    def _count(self, record: JobRecord, index: int, votes: list[int]) -> None:
        record.count(index, votes)
        self._held.pop((record.job.id, index), None)
        self._backlog.book(record.job, -record.shards[index].rows)
        self._rate.count(record.shards[index].rows, self._clock())
        if record.complete:
            self._end(record, State.SUCCEEDED)
        else:
            record.changed.notify()

    def _settle(self, delivery: _Delivery, problem: Mapping[str, Any]) -> None:
        """Put a shard back after a failure or a worker crash, or end its job with the problem."""
        if delivery.record.is_poison(delivery.lease.shard.index):
            self._dead_letters += 1
            self._end(delivery.record, State.FAILED, dict(problem))
        else:
            self._put_back(delivery)

    def _put_back(self, delivery: _Delivery) -> None:
        lease = delivery.lease
        del self._held[lease.job.id, lease.shard.index]
        insort(delivery.record.waiting, lease.shard.index)
        self._arrived.notify()

    def _end(self, record: JobRecord, state: State, problem: dict[str, Any] | None = None) -> None:
        job = record.job
        record.state, record.finished, record.problem = state, self._clock(), problem
        record.job = replace(
            job, pixels=b""
        )  # No response needs the image, and it is most of a job's memory.
        record.waiting.clear()
        for shard in record.shards:
            self._held.pop((job.id, shard.index), None)
        record.shards, record.counted = (), set()
        self._backlog.book(job, record.rows_done - job.charge)
        self._ended[job.id] = self._open.pop(job.id)
        self._queues.remove(record)
        record.changed.notify()

    def _erase(self, record: JobRecord) -> None:
        if record.job.id in self._open:
            self._end(record, State.CANCELLED)
        del self._ended[record.job.id]
        if record.caller_key is not None:
            del self._caller_keys[record.caller_key]
        for alias in record.aliases:
            if self._aliases.get(alias) is record:
                del self._aliases[alias]

    def _sweep(self) -> None:
        """Expire leases, silent workers, unserved jobs, and jobs past their retention."""
        now = self._clock()
        for delivery in [held for held in self._held.values() if held.expires <= now]:
            self._expire(delivery)
        for worker, last_seen in list(self._workers.values()):
            if last_seen + self._options.worker_seconds < now:
                del self._workers[worker.id]
        for late in self._queues.unserved(self._served(), now, self._options.unserved_seconds):
            self._end(late, State.FAILED, late.reported or abandoned(late.job.id))
        while (record := _first(self._open)) and self._is_past(record, now):
            self._erase(record)
        while (record := _first(self._ended)) and (
            self._is_past(record, now) or len(self._ended) > self._options.max_finished_jobs
        ):
            self._erase(record)

    def _is_past(self, record: JobRecord, now: float) -> bool:
        since = record.submitted if record.finished is None else record.finished
        return since + self._options.retention_seconds <= now

    def _expire(self, delivery: _Delivery) -> None:
        record = delivery.record
        if record.state.ended:
            return  # Another lease that expired in this sweep ended the job.
        record.worker_crashes[delivery.lease.shard.index] += delivery.started
        self._settle(delivery, died_over(record.job.id))


def _first(records: Mapping[str, JobRecord]) -> JobRecord | None:
    return next(iter(records.values()), None)
