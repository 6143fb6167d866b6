"""Packs leased shards of one task and bundle into device batches; no I/O, no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.protocol import Lease
from service.jobs import Mode


@dataclass(frozen=True, slots=True)
class Slice:
    """A lease's part of one batch: rows [start, stop), numbered as in the shard's domain."""

    lease: Lease
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of noise rows in the slice."""
        return self.stop - self.start


@dataclass(slots=True, eq=False)
class _Entry:
    """A lease in flight: the ranges of rows in no batch yet, and the votes (K,) counted so far."""

    lease: Lease
    todo: deque[tuple[int, int]]
    counts: NDArray[np.int64]
    alone: bool
    rows_counted: int = 0


class Packer:
    """Fills batches of at most `batch_rows` rows from many leases, oldest first.

    A lease that is isolated, of purifications or a demonstration, or was put back as `alone`, never
    shares a batch. A demonstration is a batch, whatever its rows.
    """

    def __init__(self, batch_rows: int) -> None:
        self._batch_rows = batch_rows
        self._entries: dict[str, _Entry] = {}

    @property
    def rows(self) -> int:
        """Rows that are in no batch yet."""
        return sum(stop - start for entry in self._entries.values() for start, stop in entry.todo)

    @property
    def leases(self) -> list[Lease]:
        """The unfinished leases, those being computed included."""
        return [entry.lease for entry in self._entries.values()]

    def add(self, lease: Lease) -> None:
        """Add all rows of a lease.

        Raises ValueError for a lease that is in flight.
        """
        if lease.token in self._entries:
            raise ValueError(f"the lease {lease.token} is in flight already")
        self._entries[lease.token] = _Entry(
            lease=lease,
            todo=deque([(lease.shard.start, lease.shard.stop)]),
            counts=np.zeros(lease.job.classes, np.int64),
            alone=lease.isolated or lease.job.demonstrates or lease.job.mode is Mode.PURIFY,
        )

    def next_batch(self) -> list[Slice]:
        """The slices of the next batch, at most `batch_rows` rows; empty where no row is left."""
        waiting = [entry for entry in self._entries.values() if entry.todo]
        if waiting and waiting[0].alone:
            lease = waiting[0].lease
            room = lease.shard.rows if lease.job.demonstrates else self._batch_rows
            return self._cut(waiting[:1], room)
        return self._cut([entry for entry in waiting if not entry.alone], self._batch_rows)

    def _cut(self, entries: Sequence[_Entry], room: int) -> list[Slice]:
        batch = []
        for entry in entries:
            while entry.todo and room:
                start, stop = entry.todo.popleft()
                cut = min(stop, start + room)
                if cut < stop:
                    entry.todo.appendleft((cut, stop))
                batch.append(Slice(entry.lease, start, cut))
                room -= cut - start
        return batch

    def put_back(self, batch: Sequence[Slice], *, alone: bool = False) -> None:
        """Put an uncounted batch back; `alone` computes each of its leases alone from then on."""
        for part in reversed(batch):
            if entry := self._entries.get(part.lease.token):
                stop = part.stop
                if entry.todo and entry.todo[0][0] == stop:
                    _, stop = entry.todo.popleft()
                entry.todo.appendleft((part.start, stop))
                entry.alone = entry.alone or alone

    def absorb(
        self, batch: Sequence[Slice], votes: NDArray[np.int64]
    ) -> list[tuple[Lease, NDArray[np.int64]]]:
        """The leases that the batch finished, with their counts (K,).

        Adds the batch's votes (len(batch), K), except those of dropped leases.

        Raises ValueError, and counts nothing, for votes of another shape.
        """
        for part in batch:
            if votes.shape != (len(batch), classes := part.lease.job.classes):
                raise ValueError(f"votes of shape {votes.shape}, not {(len(batch), classes)}")
        finished = []
        for part, counts in zip(batch, votes, strict=True):
            entry = self._entries.get(part.lease.token)
            if entry is None:
                continue
            entry.counts += counts
            entry.rows_counted += part.rows
            if entry.rows_counted == entry.lease.shard.rows:
                finished.append((entry.lease, entry.counts))
                self.drop(entry.lease)
        return finished

    def drop(self, lease: Lease) -> None:
        """Drop a lease and its rows; ignores a lease that is not in flight."""
        self._entries.pop(lease.token, None)
