"""Runs adaptation jobs: one low-priority process at a time, the oldest job first."""

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
    """Searches the folders for open jobs, and runs the first one whose lock is free.

    `locks` exclude the other workers of a fleet. A job whose folder raises errors is postponed,
    and the others go on.
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
        self._postponed: dict[str, tuple[float, Run]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Run jobs until `stop`; the running job ends then, and can go on later."""
        swept = False
        while not stop.is_set():
            try:
                if not swept and self._repository.exists:
                    await asyncio.to_thread(self._repository.sweep)
                    swept = True
                while await self._run_first(stop):
                    pass
            except EngineUnreachable:
                pass  # `EngineConnection` logs that Redis is unreachable.
            except Exception:
                logger.exception("adaptation jobs cannot be run; trying again")
            await sleep_or_stop(stop, self._patience.poll)

    async def _run_first(self, stop: asyncio.Event) -> bool:
        """Run the oldest open job whose lock is free; False if there is none."""
        open_jobs = await asyncio.to_thread(self._repository.unfinished)
        ids = {task.id for task in open_jobs}
        self._postponed = {name: entry for name, entry in self._postponed.items() if name in ids}
        for task in open_jobs:
            if stop.is_set():
                return False
            if task.id in self._postponed and time.monotonic() < self._postponed[task.id][0]:
                continue
            async with self._locks.acquire(task.id) as lock:
                if lock is not None and await self._run(task, lock, stop):
                    return True
        return False

    async def _run(self, task: Task, lock: HeldLock, stop: asyncio.Event) -> bool:
        """Run the job until its end or `stop`; False if it cannot run here now."""
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
            logger.exception("job %s is postponed for %g s", task.id, seconds, extra=named)
            self._postponed[task.id] = time.monotonic() + seconds, run
            return False
        finally:
            metrics.ADAPTATION_PROGRESS.set(float("nan"))
            run.stop()  # For a supervisor that is cancelled.
        return True

    def _tidy(self, task_id: str) -> None:
        """Count the outcome of an ended job, and remove leftovers of its processes."""
        if not self._repository.exists:
            return  # The volume is unmounted; the job has not ended.
        self._repository.clear(task_id)
        _count_end(self._repository.find(task_id))
        self._repository.sweep()

    def _run_of(self, job: Path) -> Run:
        """The postponed run of the job, or a new one."""
        if job.name in self._postponed:
            return self._postponed.pop(job.name)[1]
        return Run(
            job,
            self._repository.tasks,
            self._command,
            self._patience,
            models=self._repository.models,
            silence=self._locks.silence,
        )


def _count_end(task: Task | None) -> None:
    """Count the outcome of a task's job if it has ended; None means a removed task."""
    status = task.status if task else Status("cancelled")
    if not status.ended:
        return
    name, named = (task.id, naming(task_id=task.id)) if task else ("(removed)", None)
    logger.info("adaptation of task %s: %s", name, status.state, extra=named)
    metrics.ADAPTATIONS.labels(outcome=status.state).inc()
    if status.started is not None and status.finished is not None:
        metrics.ADAPTATION_SECONDS.observe(max(0.0, status.finished - status.started))
