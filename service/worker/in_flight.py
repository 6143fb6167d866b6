"""Leased shards of a worker, by task and bundle, with the time of their last renewal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.rows import Rows
from service.engine.protocol import Lease
from service.jobs import Mode
from service.worker.batching import Packer, Slice
from service.worker.model import Model


@dataclass(slots=True, eq=False)
class TaskBatch:
    """The leases of one task; `bundle` is the digest in the noise keys of their jobs."""

    task: str
    bundle: str
    model: Model
    packer: Packer

    @property
    def is_served(self) -> bool:
        """Whether the model still has the digest and is available."""
        return self.model.digest == self.bundle and self.model.is_available


class InFlight:
    """The leases of one worker, those of the batch being computed included."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, str], TaskBatch] = {}
        self._renewed: dict[str, float] = {}  # by token: when the lease began, or was renewed

    @property
    def rows(self) -> int:
        """Rows that are in no batch yet."""
        return sum(task.packer.rows for task in self._tasks.values())

    @property
    def leases(self) -> list[Lease]:
        """Every lease of the worker."""
        return [lease for task in self._tasks.values() for lease in task.packer.leases]

    def add(self, lease: Lease, model: Model, began: float) -> None:
        """Add a lease that `began` then (time.monotonic), for this model.

        The model may replace another one of the same digest.
        """
        key = (lease.job.task, lease.job.bundle)
        task = self._tasks.setdefault(key, TaskBatch(*key, model, Packer(model.batch_rows)))
        task.model = model
        task.packer.add(lease)
        self._renewed[lease.token] = began

    def next_task(self) -> TaskBatch | None:
        """The task of the next batch, or None; tasks with rows take turns."""
        for key, task in list(self._tasks.items()):
            if not task.packer.leases:
                del self._tasks[key]
            elif task.packer.rows:
                self._tasks[key] = self._tasks.pop(key)
                return task
        return None

    def remove(self, task: TaskBatch) -> list[Lease]:
        """The dropped leases: all of the task."""
        leases = task.packer.leases
        for lease in leases:
            task.packer.drop(lease)
        return leases

    def older_than(self, seconds: float) -> list[Lease]:
        """The leases that began, or were last renewed, at least `seconds` ago."""
        since = time.monotonic() - seconds
        return [lease for lease in self.leases if self._renewed[lease.token] <= since]

    def keep(self, leases: Sequence[Lease], held: Sequence[Lease]) -> bool:
        """Note that `held` were renewed now, and drop the other `leases`; True where none was."""
        now, tokens = time.monotonic(), {lease.token for lease in held}
        for lease in leases:
            if lease.token in tokens:
                self._renewed[lease.token] = now
            elif task := self._tasks.get((lease.job.task, lease.job.bundle)):
                task.packer.drop(lease)
        self._renewed = {lease.token: self._renewed[lease.token] for lease in self.leases}
        return len(tokens) == len(leases)


def leases_of(batch: Sequence[Slice]) -> list[Lease]:
    """The leases of a batch, each once."""
    return list({part.lease.token: part.lease for part in batch}.values())


def rows_of(part: Slice) -> Rows:
    """The rows of a slice, as a model takes them."""
    job, shard = part.lease.job, part.lease.shard
    stage = job.stage_of(shard)
    return Rows(
        pixels=np.frombuffer(job.pixels, np.uint8).reshape(job.shape),
        key=job.domain_key(shard.domain, stage),
        start=part.start,
        stop=part.stop,
        sigma=job.sigmas[stage],
        purified=job.mode is Mode.PURIFY,
    )
