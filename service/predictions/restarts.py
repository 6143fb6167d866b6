"""Open jobs whose digest no live worker serves any more begin anew under one that is served."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.bundle import Bundle
from service.engine.connection import AWAY
from service.engine.protocol import Capacity, Engine
from service.jobs import Job, noise_key
from service.operations import metrics
from service.operations.logs import about

logger = logging.getLogger("vouchsafe")

LOOK_SECONDS = 1.0
PATIENCE = 8
"""Looks in a row that must miss a digest: after an outage workers come back one by one."""
MOST_RESTARTS = 8
"""Of one job. A shape of 64 rows is halved five times before it is the smallest."""


@dataclass(slots=True)
class _Open:
    """An open job: its served digest, that of the bundle it was asked of, and what befell it."""

    task: str
    bundle: str
    task_digest: str
    pixels_sha256: str
    missing: int = 0
    restarts: int = 0


class Restarts:
    """Looks every `seconds` after the open jobs of this process (design.md, Numerics).

    A worker whose device ran out of memory serves a task under another digest. What was counted of
    a job under the old one is thrown away, and its rows are drawn with a key of their own: votes of
    two numerics are never added up. What was counted has no part in it.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Mapping[str, Bundle],
        secret: bytes,
        seconds: float = LOOK_SECONDS,
    ) -> None:
        self._engine, self._tasks, self._secret, self._seconds = engine, tasks, secret, seconds
        self._open: dict[str, _Open] = {}  # by job
        self._looking: asyncio.Task[None] | None = None
        self._is_closed = False

    def begin(self, job: Job) -> None:
        """The job, with its pixels, is open from now on."""
        sha256 = hashlib.sha256(job.pixels).hexdigest()
        self._open[job.id] = _Open(job.task, job.bundle, job.task_digest, sha256)
        if not self._is_closed and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._look_on())

    def end(self, job_id: str) -> None:
        """The job is over."""
        self._open.pop(job_id, None)

    async def close(self) -> None:
        """Look no more, whatever begins."""
        self._is_closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look_on(self) -> None:
        while self._open:
            await asyncio.sleep(self._seconds)
            try:
                capacity = await self._engine.capacity()
            except AWAY:
                continue  # Who asks is told; here it is looked at again.
            except Exception:
                logger.exception("the open jobs could not be looked after")
                continue
            for job_id, known in list(self._open.items()):
                try:
                    await self._look_at(job_id, known, capacity)
                except AWAY:
                    break
                except Exception:
                    logger.exception("the open job %s could not be looked after", job_id)

    async def _look_at(self, job_id: str, known: _Open, capacity: Capacity) -> None:
        bundle = self._tasks.get(known.task)
        if bundle is None or bundle.digest != known.task_digest:
            return  # Not the same question: it is withdrawn.
        digests = capacity.digests_of(known.task, bundle)
        known.missing = known.missing + 1 if digests and known.bundle not in digests else 0
        if known.missing < PATIENCE or known.restarts >= MOST_RESTARTS:
            return  # Redis fails it once nobody has served it for long; in memory it waits.
        status = await self._engine.status(job_id)
        if status is None or status.state.ended:
            return
        job, served, known.missing = status.job, digests[0], 0
        if job.bundle != known.bundle:  # It has begun anew, and nobody here was told.
            known.bundle = job.bundle
            return
        key = noise_key(self._secret, replace(job, bundle=served), known.pixels_sha256)
        if await self._engine.restart(job_id, served, key):
            known.bundle, known.restarts = served, known.restarts + 1
            metrics.RESTARTS.inc()
            logger.warning(
                "a job begins anew under digest %s: no live worker serves %s any more",
                served[:16],
                job.bundle[:16],
                extra=about([job]),
            )
