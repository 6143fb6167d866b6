"""Open jobs whose digest no live worker serves any more begin anew under one that is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from models.bundle import Bundle
from service import telemetry
from service.engine import Engine
from service.jobs import Job, noise_key
from service.logs import about
from service.outage import AWAY

logger = logging.getLogger("vouchsafe")


class Restarts:
    """Looks every `seconds` after the open jobs of this process (design.md, Numerics).

    A worker whose device ran out of memory serves a task under another digest. What was counted of
    a job under the old one is thrown away, and its rows are drawn with a key of their own: votes of
    two numerics are never added up. What was counted has no part in it.
    """

    def __init__(
        self, engine: Engine, tasks: Mapping[str, Bundle], secret: bytes, seconds: float = 1.0
    ) -> None:
        self._engine, self._tasks, self._secret, self._seconds = engine, tasks, secret, seconds
        self._bundles: dict[str, tuple[str, str]] = {}  # by job: its task and digest
        self._looking: asyncio.Task[None] | None = None

    def begin(self, job: Job) -> None:
        """The job is open from now on."""
        self._bundles[job.id] = job.task, job.bundle
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_on())

    def end(self, job_id: str) -> None:
        """The job is over."""
        self._bundles.pop(job_id, None)

    async def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look_on(self) -> None:
        while self._bundles:
            await asyncio.sleep(self._seconds)
            try:
                await self._look()
            except AWAY:
                continue  # Who asks is told; here it is looked at again.
            except Exception:
                logger.exception("open jobs could not be looked after")

    async def _look(self) -> None:
        capacity = await self._engine.capacity()
        for job_id, (task, bundle) in list(self._bundles.items()):
            digests = capacity.digests.get(task, frozenset())
            if digests and bundle not in digests:
                await self._restart(job_id, capacity.bundles[task])

    async def _restart(self, job_id: str, bundle: str) -> None:
        status = await self._engine.status(job_id)
        if status is None or status.state.ended or job_id not in self._bundles:
            return
        job, described = status.job, self._tasks.get(status.job.task)
        if described is None or len(described.labels) != job.classes:
            return  # Not the same question: it is withdrawn, or fails unserved.
        key = noise_key(self._secret, job.pixels, job.shape, bundle, job.sigma)
        if await self._engine.restart(job_id, bundle, key):
            telemetry.RESTARTS.inc()
            logger.warning(
                "a job begins anew under digest %s: no live worker serves %s any more",
                bundle[:16],
                job.bundle[:16],
                extra=about([job]),
            )
        self._bundles[job_id] = job.task, bundle
