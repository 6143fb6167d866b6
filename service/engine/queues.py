"""The in-process engine's lines: whose shards wait, and which are next. Without a clock."""

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

    `served` is the last pull; the last `passed` pulls left the `lo` priority waiting. No worker has
    announced the line since `unserved`, where that is known.
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
        """What is next of the line, and for how many seconds it has gone unserved."""
        record = next(self.waiting())
        since = max(self.served, record.submitted)
        return Candidate(self.task, record.job.mode.priority == "hi", now - since)

    def take(self, rows: int) -> list[tuple[JobRecord, int]]:
        """Take waiting shards until `rows` are reached; an isolated one only by itself."""
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
    """Every line with open jobs, by task and bundle."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], Queue] = {}

    def add(self, record: JobRecord) -> None:
        """Put a job last in its line."""
        job = record.job
        line = self._lines.setdefault((job.task, job.bundle), Queue(job.task))
        line.priorities[job.mode.priority][job.id] = record

    def remove(self, record: JobRecord) -> None:
        """Take a job out of its line."""
        job = record.job
        line = self._lines[job.task, job.bundle]
        del line.priorities[job.mode.priority][job.id]
        if not any(line.priorities.values()):
            del self._lines[job.task, job.bundle]

    def priority(self, priority: str) -> list[JobRecord]:
        """The open jobs of one priority, whatever their line."""
        return [
            record for line in self._lines.values() for record in line.priorities[priority].values()
        ]

    def unserved(
        self, served: Collection[tuple[str, str]], now: float, seconds: float
    ) -> list[JobRecord]:
        """The open jobs of the lines that were not among the served ones for so many seconds.

        None where nothing is served at all.
        """
        late: list[JobRecord] = []
        for item, line in self._lines.items():
            if not served or item in served:
                line.unserved = None
            elif line.unserved is None:
                line.unserved = now
            if line.unserved is not None and now - line.unserved >= seconds:
                late += chain.from_iterable(
                    priority.values() for priority in line.priorities.values()
                )
        return late

    def next_for(
        self, worker: Worker, prefer_task: str | None, starvation_seconds: float, now: float
    ) -> Queue | None:
        """The line of which the worker is to take, or None where nothing waits that it serves."""
        lines = [self._lines[item] for item in worker.bundles.items() if item in self._lines]
        offers = [line.offer(now) for line in lines if any(line.waiting())]
        offer = next_offer(offers, prefer_task, starvation_seconds)
        return None if offer is None else self._lines[offer.task, worker.bundles[offer.task]]
