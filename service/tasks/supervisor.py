"""Runs adaptation jobs: one low-priority process at a time, in the order that they were made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from models.adaptation.plan import Status
from service.background import sleep_or_stop
from service.operations import metrics
from service.operations.logs import naming
from service.tasks.process import JOB, Patience, Run
from service.tasks.repository import TaskRepository
from service.tasks.task import Task

logger = logging.getLogger("vouchsafe.tasks")


class Jobs(Protocol):
    """Where a supervisor gets its jobs, one at a time."""

    @property
    def silence(self) -> float | None:
        """Seconds that a job's process may go on unattended; None: for as long as its starter."""

    async def in_place(self) -> bool:
        """Whether the folders are those of the jobs: in others nothing is tidied up."""

    async def next(self, skip: Collection[str]) -> Task | None:
        """A job to run now, except for those to skip, or None; `let_go` it before the next."""

    @property
    def held(self) -> bool:
        """Whether the job may still be run here; where not, its folder is another's already."""

    async def let_go(self) -> None:
        """The job has ended, or is not run here any more, and no process of it is left."""


class FolderJobs:
    """All unfinished jobs of the folders: nobody runs any but processes that share their locks."""

    silence: float | None = None
    held = True

    def __init__(self, store: TaskRepository) -> None:
        self._store = store

    async def next(self, skip: Collection[str]) -> Task | None:
        """The oldest unfinished job that is not skipped."""
        unfinished = await asyncio.to_thread(self._store.unfinished)
        return next((task for task in unfinished if task.id not in skip), None)

    async def in_place(self) -> bool:
        """Always: there are no other folders."""
        return True

    async def let_go(self) -> None:
        """Nothing: the job's own locks say who runs it."""


class Supervisor:
    """Runs unfinished jobs in the background, all of the store's unless `jobs` are given.

    A job whose folder is in trouble is put aside for a while, and the others go on.
    """

    def __init__(
        self,
        store: TaskRepository,
        command: Sequence[str] = JOB,
        patience: Patience | None = None,
        jobs: Jobs | None = None,
    ) -> None:
        self._store = store
        self._command = command
        self._patience = patience or Patience()
        self._jobs = jobs or FolderJobs(store)
        self._aside: dict[str, tuple[float, Run]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Run jobs until `stop`, then end the one that runs so that it can go on later."""
        swept = False
        while not stop.is_set():
            try:
                if not swept and await self._jobs.in_place():
                    await asyncio.to_thread(self._store.sweep)
                    swept = True
                await self._run_all(stop)
            except Exception:
                logger.exception("adaptation jobs cannot be looked after; trying again")
            await sleep_or_stop(stop, self._patience.poll)

    async def _run_all(self, stop: asyncio.Event) -> None:
        """Run jobs as long as there are any that nobody else runs."""
        passed_over: set[str] = set()
        while not stop.is_set():
            await asyncio.to_thread(self._forget_ended)
            now = time.monotonic()
            waiting = {task_id for task_id, (due, _) in self._aside.items() if now < due}
            task = await self._jobs.next(waiting | passed_over)
            if task is None:
                return
            try:
                if await self._run(task, stop):
                    passed_over.clear()
                else:
                    passed_over.add(task.id)
            finally:
                await self._jobs.let_go()

    def _forget_ended(self) -> None:
        """Jobs that were put aside and have ended since begin anew if they are asked for again."""
        for task_id in list(self._aside):
            task = self._store.find(task_id)
            if task is None or task.status.ended:
                del self._aside[task_id]

    async def _run(self, task: Task, stop: asyncio.Event) -> bool:
        """Run the job to its end, or until `stop`; False where it is not to be run here or now."""
        job = self._store.jobs / task.id
        run = self._run_of(job)
        try:
            while not stop.is_set() and self._jobs.held and not run.step():
                if not run.is_mine:
                    return False
                metrics.ADAPTATION_PROGRESS.set(Status.read(job).progress)
                await sleep_or_stop(stop, self._patience.look)
            if not self._jobs.held:
                told = naming(task_id=task.id)
                logger.warning(
                    "job %s: is not ours any more; its process is ended", task.id, extra=told
                )
                run.abandon()
                return False
            if run.is_mine:
                await asyncio.to_thread(run.stop)
                if not await self._jobs.in_place():
                    return False
                await asyncio.to_thread(self._store.clear, task.id)
                count_end(self._store.find(task.id))
                await asyncio.to_thread(self._store.sweep)
        except Exception:
            told, seconds = naming(task_id=task.id), self._patience.aside
            logger.exception("job %s is put aside for %g s", task.id, seconds, extra=told)
            self._aside[task.id] = time.monotonic() + self._patience.aside, run
            return False
        finally:
            metrics.ADAPTATION_PROGRESS.set(float("nan"))
            run.stop()  # Where the supervisor itself is cancelled.
        return True

    def _run_of(self, job: Path) -> Run:
        """A new run, or the one that was put aside."""
        if job.name in self._aside:
            return self._aside.pop(job.name)[1]
        return Run(
            job,
            self._store.tasks,
            self._command,
            self._patience,
            models=self._store.models,
            silence=self._jobs.silence,
        )


def count_end(task: Task | None) -> None:
    """Count how the job of a task ended, where it did; None: by the removal of its task."""
    status = task.status if task else Status("cancelled")
    if not status.ended:
        return
    name, named = (task.id, naming(task_id=task.id)) if task else ("(removed)", None)
    logger.info("adaptation of task %s: %s", name, status.state, extra=named)
    metrics.ADAPTATIONS.labels(outcome=status.state).inc()
    if status.started is not None and status.finished is not None:
        metrics.ADAPTATION_SECONDS.observe(max(0.0, status.finished - status.started))
