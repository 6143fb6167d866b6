"""Adaptation jobs on a worker of a fleet: taken one at a time, under a lease.

A runner stops by itself once it has not renewed its lease for half of it, whether Redis answers or
not; its job's process ends by itself after a quarter of a lease unattended. So a runner that is cut
off or stopped has no process left when its lease runs out and another begins, and two machines
never write one folder, even where they do not share its locks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence

from models.adaptation.plan import Status
from service.background import BackgroundTask
from service.engine.redis.adaptations import Adaptations, AnotherVolume
from service.operations.logs import naming
from service.tasks.notices import RENEWALS, Away, Line, reconcile_if_due
from service.tasks.process import JOB, Patience
from service.tasks.repository import TaskRepository
from service.tasks.supervisor import Supervisor, count_end
from service.tasks.task import Task

logger = logging.getLogger("vouchsafe.tasks")

LOSSES_ALLOWED = 5
"""How many workers may lose a job's lease before it gets any further."""
KEPT, SILENCE = 1 / 2, 1 / 4
"""Shares of a lease: after which a runner that could not renew stops, and for which a job's process
goes on unattended."""


class LeasedJobs:
    """The jobs of a worker's supervisor: one at a time, under a lease that is renewed meanwhile.

    `store` has the same folders as those of every other worker and of the API; as long as it has
    not, there are no jobs, and nothing is told of those that Redis knows.
    """

    def __init__(self, store: TaskRepository, adaptations: Adaptations, worker_id: str) -> None:
        self._store = store
        self._adaptations = adaptations
        self._worker_id = worker_id
        self._line = Line(adaptations.lease_seconds * RENEWALS)
        self._volume = ""
        self._in_place: bool | None = None
        self._task_id: str | None = None
        self._kept_until = 0.0
        self._renewing: asyncio.Task[None] | None = None
        self._renewal = asyncio.Lock()

    @property
    def silence(self) -> float:
        """A quarter of a lease."""
        return self._adaptations.lease_seconds * SILENCE

    @property
    def held(self) -> bool:
        """Whether the lease was renewed lately, and is not known to be lost."""
        return self._task_id is not None and time.monotonic() < self._kept_until

    async def next(self, skip: Collection[str]) -> Task | None:
        """The first job that nobody runs; None too where Redis or the volume is out of reach."""
        passed_over = set(skip)
        try:
            self._volume = await asyncio.to_thread(self._store.volume)
            await reconcile_if_due(self._store, self._volume, self._adaptations, self._line)
            while True:
                taking = self._adaptations.take(self._volume, self._worker_id, passed_over)
                task_id = await self._line.ask(taking)
                self._tell_place(True)
                if task_id is None:
                    return None
                self._task_id = task_id
                task = await asyncio.to_thread(self._store.find, task_id)
                if task is not None and await self._begin(task):
                    return task
                await self.let_go()
                passed_over.add(task_id)
        except AnotherVolume as error:
            if error.known:
                self._tell_place(False)
            return None
        except Away:
            return None

    async def in_place(self) -> bool:
        """Whether the fleet's folders were there when Redis was last asked, and are now."""
        volume = await asyncio.to_thread(self._store.volume)
        return self._in_place is True and volume == self._volume

    async def let_go(self) -> None:
        """Close the job where it has ended, and leave it to others where it has not."""
        task_id, self._task_id = self._task_id, None
        if self._renewing is not None:
            async with self._renewal:  # One that Redis gets late would lease the job anew.
                self._renewing.cancel()
            await asyncio.wait({self._renewing})
            self._renewing = None
        if task_id is None:
            return
        task = await asyncio.to_thread(self._store.find, task_id)
        ended = task is not None and task.status.ended
        gone = task is None and await asyncio.to_thread(self._is_gone, task_id)
        leave = self._adaptations.close_job if ended or gone else self._adaptations.release
        try:
            await self._line.ask(leave(task_id, self._worker_id))
        except Away:
            return  # The lease runs out, and the next worker sees how the job stands.

    def _is_gone(self, task_id: str) -> bool:
        """Whether the job's folder was removed, and not the volume with all of them."""
        return not (self._store.jobs / task_id).exists() and self._store.volume() == self._volume

    def _tell_place(self, in_place: bool) -> None:
        """Log, once, that these folders are not the fleet's, and that they are so after all."""
        if not in_place and self._in_place is not False:
            logger.warning(
                "this machine does not share the API's data directory (its own is %s): it takes no "
                "adaptation jobs; share it, or set VOUCHSAFE_ADAPT=false",
                self._store.jobs.parent,
            )
        elif in_place and self._in_place is False:
            logger.info("this machine shares the API's data directory: it takes adaptation jobs")
        self._in_place = in_place

    async def _begin(self, task: Task) -> bool:
        """Whether the job is to be run; its lease is renewed from now on then."""
        if task.status.ended:
            return False
        losses = await self._renewed(task.id, task.status.progress)
        if losses is None:
            return False
        if losses >= LOSSES_ALLOWED:
            await asyncio.to_thread(self._give_up, task.id, losses)
            return False
        self._renewing = asyncio.create_task(self._renew(task.id))
        return True

    async def _renewed(self, task_id: str, progress: float) -> int | None:
        """The lease's losses, or None where it is lost."""
        asked = time.monotonic()
        renewing = self._adaptations.renew(task_id, self._worker_id, progress)
        losses = await self._line.ask(renewing)
        lease = self._adaptations.lease_seconds
        self._kept_until = 0.0 if losses is None else asked + lease * KEPT
        return losses

    async def _renew(self, task_id: str) -> None:
        """Renew the lease until it is lost, or could not be renewed in time."""
        while self.held:
            await asyncio.sleep(self._adaptations.lease_seconds * RENEWALS)
            try:
                progress = await asyncio.to_thread(self._progress, task_id)
                async with self._renewal:
                    if self.held:
                        await self._renewed(task_id, progress)
            except Away:
                continue
            except Exception:
                logger.exception(
                    "the lease of job %s could not be renewed",
                    task_id,
                    extra=naming(task_id=task_id),
                )

    def _progress(self, task_id: str) -> float:
        try:
            return Status.read(self._store.jobs / task_id).progress
        except (OSError, ValueError, TypeError):
            return 0.0

    def _give_up(self, task_id: str, losses: int) -> None:
        """Let a job fail that its workers do not outlive; what cannot be written is tried again."""
        detail = (
            f"{losses} workers went away while they ran the adaptation, without getting further. "
            "Too little memory is the likeliest cause: their own logs, or those of their machines, "
            "say how they ended. Post the same task to try again"
        )
        job = self._store.jobs / task_id
        failed = Status.read(job).changed(state="failed", finished=time.time(), eta_seconds=None)
        try:
            failed.changed(problem={"kind": "died", "detail": detail}).write(job)
        except OSError as error:
            told = naming(task_id=task_id)
            logger.error("job %s: its failure cannot be written: %s", task_id, error, extra=told)
            return
        logger.error("job %s: %s", task_id, detail, extra=naming(task_id=task_id))
        count_end(self._store.find(task_id))


def adapting(
    store: TaskRepository,
    adaptations: Adaptations,
    worker_id: str,
    command: Sequence[str] = JOB,
    patience: Patience | None = None,
) -> BackgroundTask:
    """A worker's companion: runs the fleet's adaptation jobs, one at a time, beside predictions.

    Told to stop, it ends the job's process and hands the job back. No two processes may have the
    same `worker_id`.
    """
    jobs = LeasedJobs(store, adaptations, worker_id)
    supervisor = Supervisor(store, command, patience, jobs)

    async def run(stop: asyncio.Event) -> None:
        try:
            await supervisor.run(stop)
        finally:
            await adaptations.close()

    return run
