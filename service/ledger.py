"""What the in-process engine writes down of its jobs: pure bookkeeping, without a clock."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from service.engine import FAILURES_ALLOWED, SOLITARY_DEATHS_ALLOWED, rows_per_second
from service.jobs import Domain, Job, JobStatus, Shard, State
from service.offers import FAST_PULLS, Offer

CallerKey = tuple[str | None, str]
"""An owner and the Idempotency-Key that came from it."""


class Bell:
    """Wakes everyone who has waited for `next_ring` since it last rang."""

    def __init__(self) -> None:
        self.next_ring = asyncio.Event()

    def ring(self) -> None:
        """Wake them; who waits from here on waits for the ring after this one."""
        self.next_ring.set()
        self.next_ring = asyncio.Event()


class Speedometer:
    """Rows per second over the last minute of work; time without work does not count."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, int, float]] = deque()
        self._rows, self._seconds, self._since = 0, 0.0, 0.0

    def work_begins(self, now: float) -> None:
        """Work came to an idle service at `now`."""
        self._since = now

    def count(self, rows: int, now: float) -> None:
        """`rows` more are done at `now`."""
        seconds, self._since = now - self._since, now
        self._spans.append((now, rows, seconds))
        self._rows += rows
        self._seconds += seconds
        while self._spans[0][0] < now - 60:
            _, rows, seconds = self._spans.popleft()
            self._rows -= rows
            self._seconds -= seconds

    @property
    def rows_per_second(self) -> float:
        """0.0 before the first count."""
        return rows_per_second(self._rows, self._seconds)


@dataclass(slots=True, eq=False)
class Record:
    """One job; shards are named by index, and `waiting` holds those that nobody has, ascending."""

    job: Job
    shards: tuple[Shard, ...]
    submitted: float
    caller_key: CallerKey | None
    fingerprint: str
    waiting: list[int]
    votes: dict[Domain, list[int]]
    state: State = State.QUEUED
    rows_done: int = 0
    started: float | None = None
    finished: float | None = None
    problem: dict[str, Any] | None = None
    counted: set[int] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    deaths: Counter[int] = field(default_factory=Counter)
    changed: Bell = field(default_factory=Bell)

    @property
    def complete(self) -> bool:
        """Whether every shard is counted."""
        return len(self.counted) == len(self.shards)

    def solitary(self, index: int) -> bool:
        """Whether a worker died over the shard, so that it must be computed alone."""
        return self.deaths[index] > 0

    def poisonous(self, index: int) -> bool:
        """Whether the shard has failed, or been died over, once too often.

        The death that made it solitary is not one of the solitary deaths.
        """
        return (
            self.failures[index] >= FAILURES_ALLOWED or self.deaths[index] > SOLITARY_DEATHS_ALLOWED
        )

    def count(self, index: int, votes: list[int]) -> None:
        """Add the votes (K,) of a shard that was not counted before."""
        shard = self.shards[index]
        tally = self.votes[shard.domain]
        self.votes[shard.domain] = [old + new for old, new in zip(tally, votes, strict=True)]
        self.counted.add(index)
        self.rows_done += shard.rows
        if index in self.waiting:
            self.waiting.remove(index)

    def status(self) -> JobStatus:
        """The job as the outside sees it."""
        return JobStatus(
            job=self.job,
            state=self.state,
            rows_done=self.rows_done,
            selection=tuple(self.votes[Domain.SELECTION]),
            estimation=tuple(self.votes[Domain.ESTIMATION]),
            started=self.started,
            finished=self.finished,
            problem=self.problem,
        )


@dataclass(slots=True, eq=False)
class Line:
    """The open jobs of one task and bundle, by lane, oldest first.

    `served` is the last pull; the last `passed` pulls left the `lo` lane waiting.
    """

    task: str
    served: float = 0.0
    passed: int = 0
    lanes: dict[str, dict[str, Record]] = field(default_factory=lambda: {"hi": {}, "lo": {}})

    def waiting(self) -> Iterator[Record]:
        """The jobs with waiting shards, in the order of service."""
        lanes = ("hi", "lo") if self.passed < FAST_PULLS else ("lo", "hi")
        records = chain.from_iterable(self.lanes[lane].values() for lane in lanes)
        return (record for record in records if record.waiting)

    def offer(self, now: float) -> Offer:
        """What is next of the line, and for how many seconds it has gone unserved."""
        record = next(self.waiting())
        since = max(self.served, record.submitted)
        return Offer(self.task, record.job.mode.lane == "hi", now - since)

    def take(self, rows: int) -> list[tuple[Record, int]]:
        """Take waiting shards until `rows` are reached; a solitary one only by itself."""
        taken = self._taken(rows)
        served = any(record.job.mode.lane == "lo" for record, _ in taken)
        waits = any(record.waiting for record in self.lanes["lo"].values())
        self.passed = self.passed + 1 if waits and not served else 0
        return taken

    def _taken(self, rows: int) -> list[tuple[Record, int]]:
        taken: list[tuple[Record, int]] = []
        for record in list(self.waiting()):
            for index in list(record.waiting):
                if rows <= 0:
                    return taken
                solitary = record.solitary(index)
                if solitary and taken:
                    continue
                record.waiting.remove(index)
                taken.append((record, index))
                rows = 0 if solitary else rows - record.shards[index].rows
        return taken
