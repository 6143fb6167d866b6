"""Runs adaptation jobs: one low-priority process at a time, in the order that they were made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from models.adaptation.plan import Status
from service.background import sleep_or_stop
from service.engine.connection import EngineUnreachable
from service.operations import metrics
from service.operations.logs import naming
from service.tasks.lock import HeldLock, LocalLocks, Locks
from service.tasks.process import JOB, Patience, Run
from service.tasks.repository import TaskRepository
from service.tasks.task import Task

logger = logging.getLogger("vouchsafe.tasks")


class Supervisor:
    """Looks through the folders for open jobs, and runs the first one whose lock is free.

    `locks` keep the workers of a fleet apart. A job whose folder is in trouble is put off for a
    while, and the others go on.
    """

    def __init__(
        self,
        repository: TaskRepository,
        command: Sequence[str] = JOB,
        patience: Patience | None = None,
        locks: Locks | None = None,
    ) -> None:
        self._repository = repository
        self._locks = locks or LocalLocks()
        self._command = command
        self._patience = patience or Patience()
        self._put_off: dict[str, tuple[float, Run]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Run jobs until `stop`, then end the one that runs so that it can go on later."""
        swept = False
        while not stop.is_set():
            try:
                if not swept and self._repository.exists:
                    await asyncio.to_thread(self._repository.sweep)
                    swept = True
                while await self._run_first(stop):
                    pass
            except EngineUnreachable:
                pass  # It is logged as Redis goes down.
            except Exception:
                logger.exception("adaptation jobs cannot be looked after; trying again")
            await sleep_or_stop(stop, self._patience.poll)

    async def _run_first(self, stop: asyncio.Event) -> bool:
        """Whether a job was run: the oldest open one whose lock was free."""
        open_jobs = await asyncio.to_thread(self._repository.unfinished)
        ids = {task.id for task in open_jobs}
        self._put_off = {name: put for name, put in self._put_off.items() if name in ids}
        for task in open_jobs:
            if stop.is_set():
                return False
            if task.id in self._put_off and time.monotonic() < self._put_off[task.id][0]:
                continue
            async with self._locks.acquire(task.id) as lock:
                if lock is not None and await self._run(task, lock, stop):
                    return True
        return False

    async def _run(self, task: Task, lock: HeldLock, stop: asyncio.Event) -> bool:
        """Run the job to its end, or until `stop`; False where it is not to be run here or now."""
        job = self._repository.jobs / task.id
        run = self._run_of(job)
        try:
            while not stop.is_set() and lock.is_held and not run.step():
                if not run.is_mine:
                    return False
                metrics.ADAPTATION_PROGRESS.set(Status.read(job).progress)
                await sleep_or_stop(stop, self._patience.look)
            if not lock.is_held:
                run.abandon()
                return False
            if run.is_mine:
                await asyncio.to_thread(run.stop)
                await asyncio.to_thread(self._tidy, task.id)
        except Exception:
            named, seconds = naming(task_id=task.id), self._patience.aside
            logger.exception("job %s is put off for %g s", task.id, seconds, extra=named)
            self._put_off[task.id] = time.monotonic() + seconds, run
            return False
        finally:
            metrics.ADAPTATION_PROGRESS.set(float("nan"))
            run.stop()  # Where the supervisor itself is cancelled.
        return True

    def _tidy(self, task_id: str) -> None:
        """Count how the job ended, where it did, and remove what its processes left."""
        if not self._repository.exists:
            return  # The volume went away with all folders: the job has not ended.
        self._repository.clear(task_id)
        _count_end(self._repository.find(task_id))
        self._repository.sweep()

    def _run_of(self, job: Path) -> Run:
        """A new run, or the one that was put off."""
        if job.name in self._put_off:
            return self._put_off.pop(job.name)[1]
        return Run(
            job,
            self._repository.tasks,
            self._command,
            self._patience,
            models=self._repository.models,
            silence=self._locks.silence,
        )


def _count_end(task: Task | None) -> None:
    """Count how the job of a task ended, where it did; None: by the removal of its task."""
    status = task.status if task else Status("cancelled")
    if not status.ended:
        return
    name, named = (task.id, naming(task_id=task.id)) if task else ("(removed)", None)
    logger.info("adaptation of task %s: %s", name, status.state, extra=named)
    metrics.ADAPTATIONS.labels(outcome=status.state).inc()
    if status.started is not None and status.finished is not None:
        metrics.ADAPTATION_SECONDS.observe(max(0.0, status.finished - status.started))
