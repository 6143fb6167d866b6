"""Jobs, leases and workers of the in-process engine, and the steps between their states."""

from __future__ import annotations

import secrets
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.engine.limits import Served
from service.engine.memory_state import BacklogRows, CallerKey, JobRecord, RateMeter
from service.engine.options import EngineOptions
from service.engine.protocol import Lease, PriorityState, Worker, abandoned, died_over
from service.engine.queues import Queues
from service.engine.signal import Signal
from service.jobs import Domain, Job, State


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


class MemoryJobs:
    """All that the in-process engine holds; its steps run at once, without waiting."""

    def __init__(self, options: EngineOptions, clock: Callable[[], float]) -> None:
        self._options = options
        self._clock = clock
        self._open: dict[str, JobRecord] = {}  # by submission
        self._ended: dict[str, JobRecord] = {}  # by end
        self._results: dict[str, JobRecord] = {}  # with a result, by commit
        self._queues = Queues()
        self._held: dict[tuple[str, int], _Delivery] = {}
        self._workers: dict[str, tuple[Worker, float]] = {}
        self._caller_keys: dict[CallerKey, JobRecord] = {}
        self._aliases: dict[str, dict[str, JobRecord]] = {}  # by alias and job id
        self._backlog = BacklogRows(options.max_queue_rows, options.max_queue_rows_per_key)
        self._dead_letters = 0
        self._rate = RateMeter()
        self._arrived, self._look_due = Signal(), Signal()

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
        shards = job.rounds(self._options.shard_rows)[0]
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
        if record.complete and not record.job.looks:
            self._end(record, State.SUCCEEDED)
        else:
            record.changed.notify()
        if record.due:
            self._look_due.notify()

    def _keep_result(self, record: JobRecord, result: bytes) -> None:
        record.result = result
        self._results[record.job.id] = record
        if len(self._results) > self._options.max_results:
            self._erase(next(iter(self._results.values())))

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
        self._results.pop(record.job.id, None)
        if record.caller_key is not None:
            del self._caller_keys[record.caller_key]
        for alias in record.aliases:
            del self._aliases[alias][record.job.id]
            if not self._aliases[alias]:
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
