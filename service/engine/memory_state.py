"""Job records, backlog and speed of the in-process engine: no clock, no I/O."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from service.engine.limits import Served, full, most_rows, over_quota, too_large, unserved
from service.engine.protocol import FAILURES_ALLOWED, ISOLATED_CRASHES_ALLOWED, rows_per_second
from service.engine.signal import Signal
from service.jobs import Domain, Job, JobStatus, Shard, State

CallerKey = tuple[str | None, str]
"""An owner and its Idempotency-Key."""


class RateMeter:
    """Rows per second over the last minute of work; time without work does not count."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, int, float]] = deque()
        self._rows, self._seconds, self._since = 0, 0.0, 0.0

    def work_begins(self, now: float) -> None:
        """Note that an idle service got work at `now` (seconds)."""
        self._since = now

    def count(self, rows: int, now: float) -> None:
        """Count `rows` that were done by `now` (seconds)."""
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
        """Measured speed; 0.0 before the first count."""
        return rows_per_second(self._rows, self._seconds)


@dataclass(slots=True, eq=False)
class JobRecord:
    """One job, and the shards of its rounds so far.

    - `waiting`: indices of the shards without a lease, ascending.
    - `failures`, `worker_crashes`: numbers by shard.
    - `reported`: the problem of the last failed attempt.
    - `problem`: that of the job once it has failed.
    - `looks`: nonzero estimation votes by class at each look that the job was extended past.
    - `result`: that of a demonstration's shard.
    """

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
    reported: dict[str, Any] | None = None
    counted: set[int] = field(default_factory=set)
    aliases: set[str] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    worker_crashes: Counter[int] = field(default_factory=Counter)
    changed: Signal = field(default_factory=Signal)
    looks: list[dict[int, int]] = field(default_factory=list)
    result: bytes = b""

    @property
    def complete(self) -> bool:
        """Whether every shard is counted."""
        return len(self.counted) == len(self.shards)

    @property
    def due(self) -> bool:
        """Whether the job waits for the decision at a look."""
        return bool(self.job.looks) and self.complete and not self.state.ended

    @property
    def round(self) -> int:
        """The place of the current round, from 0."""
        return len(self.looks)

    def isolated(self, index: int) -> bool:
        """Whether a worker crashed on the shard, which must be computed alone since."""
        return self.worker_crashes[index] > 0

    def is_poison(self, index: int) -> bool:
        """Whether the shard has reached its limit of failures or of worker crashes.

        The crash that isolated the shard does not count as an isolated one.
        """
        return (
            self.failures[index] >= FAILURES_ALLOWED
            or self.worker_crashes[index] > ISOLATED_CRASHES_ALLOWED
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

    def extend(self, shards: tuple[Shard, ...]) -> None:
        """Begin the next round, which has these shards."""
        votes = enumerate(self.votes[Domain.ESTIMATION])
        self.looks.append({label: count for label, count in votes if count})
        if self.job.stages:
            self.votes[Domain.SELECTION] = [0] * self.job.classes
        self.waiting += [shard.index for shard in shards]
        self.shards += shards

    def return_to(self, look: int) -> bool:
        """Restore the votes at `look`; False unless it is due or the last one extended past."""
        if self.due and look == self.job.looks[self.round]:
            return True
        if not self.looks or look != sum(self.looks[-1].values()):
            return False
        self.votes[Domain.ESTIMATION] = list(self._dense(self.looks.pop()))
        return True

    def _dense(self, votes: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(votes.get(label, 0) for label in range(self.job.classes))

    def status(self) -> JobStatus:
        """The job's status, as Engine returns it."""
        return JobStatus(
            job=self.job,
            state=self.state,
            rows_done=self.rows_done,
            selection=tuple(self.votes[Domain.SELECTION]),
            estimation=tuple(self.votes[Domain.ESTIMATION]),
            started=self.started,
            finished=self.finished,
            problem=self.problem,
            looks=tuple(map(self._dense, self.looks)),
            due=self.due,
            result=self.result,
        )


class BacklogRows:
    """The rows that wait or are leased, in all and by owner, and their limits."""

    def __init__(self, max_queue_rows: int, max_queue_rows_per_key: int | None) -> None:
        self.rows = 0
        self._bound, self._owner_bound = max_queue_rows, max_queue_rows_per_key
        self._owner_rows: Counter[str] = Counter()

    def of(self, owner: str | None) -> int:
        """The rows of one owner; 0 for jobs without an owner."""
        return 0 if owner is None else self._owner_rows[owner]

    def admit(self, job: Job, served: Served, speed: float) -> None:
        """Check a job against the limits; `speed` is in rows per second.

        Raises InvalidField, Backlog or QuotaExceeded where the job is rejected.
        """
        bound = most_rows(job.owner, self._bound, self._owner_bound)
        if job.rows > bound:
            raise too_large(job, bound)
        if (job.task, job.bundle) not in served:
            raise unserved(job.task)
        of_owner, quota = self.of(job.owner), None if job.owner is None else self._owner_bound
        if quota is not None and of_owner + job.charge > quota:
            raise over_quota(job.charge, of_owner, quota, speed)
        if self.rows + job.charge > self._bound:
            raise full(job.charge, self.rows, speed)

    def book(self, job: Job, rows: int) -> None:
        """Add `rows` to the backlog and to the part of the job's owner; negative where they end."""
        self.rows += rows
        if job.owner is not None:
            self._owner_rows[job.owner] += rows
            if not self._owner_rows[job.owner]:
                del self._owner_rows[job.owner]
