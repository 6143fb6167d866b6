"""Queues of the in-process engine, and the choice of the next shards; no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain

from service.engine.memory_state import JobRecord
from service.engine.protocol import Worker
from service.engine.scheduling import FAST_PULLS, Candidate, next_offer


@dataclass(slots=True, eq=False)
class Queue:
    """The open jobs of one task and bundle, by priority, oldest first.

    `served` is the time of the last pull. The last `passed` pulls left the `lo` priority waiting.
    No worker has announced the queue since `unserved`, where that is not None.
    """

    task: str
    served: float = 0.0
    passed: int = 0
    unserved: float | None = None
    priorities: dict[str, dict[str, JobRecord]] = field(
        default_factory=lambda: {"hi": {}, "lo": {}}
    )

    def waiting(self) -> Iterator[JobRecord]:
        """The jobs with waiting shards, in the order of service."""
        priorities = ("hi", "lo") if self.passed < FAST_PULLS else ("lo", "hi")
        records = chain.from_iterable(self.priorities[priority].values() for priority in priorities)
        return (record for record in records if record.waiting)

    def offer(self, now: float) -> Candidate:
        """The next shard as a candidate, with the seconds since the queue was served."""
        record = next(self.waiting())
        since = max(self.served, record.submitted)
        return Candidate(self.task, record.job.mode.priority == "hi", now - since)

    def take(self, rows: int) -> list[tuple[JobRecord, int]]:
        """Records and shard indices, taken until `rows` are reached; an isolated shard alone."""
        taken = self._taken(rows)
        served = any(record.job.mode.priority == "lo" for record, _ in taken)
        waits = any(record.waiting for record in self.priorities["lo"].values())
        self.passed = self.passed + 1 if waits and not served else 0
        return taken

    def _taken(self, rows: int) -> list[tuple[JobRecord, int]]:
        taken: list[tuple[JobRecord, int]] = []
        for record in list(self.waiting()):
            for index in list(record.waiting):
                if rows <= 0:
                    return taken
                isolated = record.isolated(index)
                if isolated and taken:
                    continue
                record.waiting.remove(index)
                taken.append((record, index))
                rows = 0 if isolated else rows - record.shards[index].rows
        return taken


class Queues:
    """Every queue with open jobs, by task and bundle."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str], Queue] = {}

    def add(self, record: JobRecord) -> None:
        """Append a job to its queue."""
        job = record.job
        queue = self._queues.setdefault((job.task, job.bundle), Queue(job.task))
        queue.priorities[job.mode.priority][job.id] = record

    def remove(self, record: JobRecord) -> None:
        """Remove a job from its queue."""
        job = record.job
        queue = self._queues[job.task, job.bundle]
        del queue.priorities[job.mode.priority][job.id]
        if not any(queue.priorities.values()):
            del self._queues[job.task, job.bundle]

    def priority(self, priority: str) -> list[JobRecord]:
        """The open jobs of one priority, of all queues."""
        return [
            record
            for queue in self._queues.values()
            for record in queue.priorities[priority].values()
        ]

    def unserved(
        self, served: Collection[tuple[str, str]], now: float, seconds: float
    ) -> list[JobRecord]:
        """The open jobs of queues that were not in `served` for `seconds`.

        An empty list where `served` is empty.
        """
        late: list[JobRecord] = []
        for item, queue in self._queues.items():
            if not served or item in served:
                queue.unserved = None
            elif queue.unserved is None:
                queue.unserved = now
            if queue.unserved is not None and now - queue.unserved >= seconds:
                late += chain.from_iterable(
                    priority.values() for priority in queue.priorities.values()
                )
        return late

    def next_for(
        self, worker: Worker, prefer_task: str | None, starvation_seconds: float, now: float
    ) -> Queue | None:
        """The queue that the worker takes from, or None where nothing waits that it serves."""
        queues = [self._queues[item] for item in worker.bundles.items() if item in self._queues]
        offers = [queue.offer(now) for queue in queues if any(queue.waiting())]
        offer = next_offer(offers, prefer_task, starvation_seconds)
        return None if offer is None else self._queues[offer.task, worker.bundles[offer.task]]
