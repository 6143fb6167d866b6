"""Runs adaptation jobs: one low-priority process at a time, in the order that they were made."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from models.adaptation.plan import Status
from service import telemetry
from service.health import passed
from service.tasks.runs import JOB, Patience, Run
from service.tasks.store import Store
from service.tasks.task import Task

logger = logging.getLogger("vouchsafe.tasks")


class Supervisor:
    """A companion of the app: runs the store's unfinished jobs in the order they were made.

    A job whose folder is in trouble is put aside for a while, and the others go on.
    """

    def __init__(
        self, store: Store, command: Sequence[str] = JOB, patience: Patience | None = None
    ) -> None:
        self._store = store
        self._command = command
        self._patience = patience or Patience()
        self._aside: dict[str, tuple[float, Run]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Run jobs until `stop`, then end the one that runs so that it can go on later."""
        swept = False
        while not stop.is_set():
            try:
                if not swept:
                    await asyncio.to_thread(self._store.sweep)
                    swept = True
                await self._run_next(stop)
            except Exception:
                logger.exception("adaptation jobs cannot be looked after; trying again")
            await passed(stop, self._patience.poll)

    async def _run_next(self, stop: asyncio.Event) -> None:
        """Run jobs as long as there are any that nobody else runs."""
        while not stop.is_set():
            waiting = await asyncio.to_thread(self._store.unfinished)
            self._aside = {t.id: self._aside[t.id] for t in waiting if t.id in self._aside}
            for task in waiting:
                if await self._run(task, stop):
                    break
            else:
                return

    async def _run(self, task: Task, stop: asyncio.Event) -> bool:
        """Run the job to its end, or until `stop`; False where it is not to be run here or now."""
        job = self._store.jobs / task.id
        run = self._run_of(job)
        if run is None:
            return False
        try:
            while not stop.is_set() and not run.step():
                if not run.is_mine:
                    return False
                telemetry.ADAPTATION_PROGRESS.set(Status.read(job).progress)
                await passed(stop, self._patience.look)
            if run.is_mine:
                await asyncio.to_thread(run.stop)
                _count(self._store.find(task.id))
                await asyncio.to_thread(self._store.sweep)
        except Exception:
            logger.exception("job %s is put aside for %g s", task.id, self._patience.aside)
            self._aside[task.id] = time.monotonic() + self._patience.aside, run
            return False
        finally:
            telemetry.ADAPTATION_PROGRESS.set(float("nan"))
            run.stop()  # Where the supervisor itself is cancelled.
        return True

    def _run_of(self, job: Path) -> Run | None:
        """A new run, the one that was put aside, or None while that is not due."""
        due, run = self._aside.get(job.name, (0.0, None))
        if run is None:
            return Run(
                job, self._store.tasks, self._command, self._patience, models=self._store.models
            )
        if time.monotonic() < due:
            return None
        del self._aside[job.name]
        return run


def _count(task: Task | None) -> None:
    """Count how the job ended, where it did."""
    status = task.status if task else Status("cancelled")
    if not status.ended:
        return
    logger.info("adaptation of task %s: %s", task.id if task else "(removed)", status.state)
    telemetry.ADAPTATIONS.labels(outcome=status.state).inc()
    if status.started is not None and status.finished is not None:
        telemetry.ADAPTATION_SECONDS.observe(max(0.0, status.finished - status.started))
