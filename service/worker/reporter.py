"""How a worker tells the engine what became of its shards, while the next batch computes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.connection import EngineAway, Reach
from service.engine.protocol import FAILURES_ALLOWED, Engine, Lease
from service.errors import Problem, ShardDead, TaskUnusable
from service.operations import metrics
from service.operations.logs import about
from service.worker.model import ModelUnavailable

logger = logging.getLogger("vouchsafe.worker")


class Outcomes:
    """Reports of one worker, each told in a coroutine of its own and asked again for `seconds`."""

    def __init__(self, engine: Engine, reach: Reach, seconds: float) -> None:
        self._engine = engine
        self._reach = reach
        self._seconds = seconds
        self._reports: set[asyncio.Task[None]] = set()

    def committed(self, lease: Lease, counts: NDArray[np.int64]) -> None:
        """The shard's votes (K,) are there."""
        self._report(self._commit(lease, counts))

    def failed(self, lease: Lease, error: Exception) -> None:
        """The shard's attempt failed with this error."""
        self._report(self._fail(lease, _problem(lease, error)))

    def released(self, leases: Sequence[Lease]) -> None:
        """The shards go back uncomputed."""
        if leases:
            self._report(self.release(leases))

    async def told(self, seconds: float, beside: asyncio.Task[None]) -> None:
        """Wait for what is still to be told, and one task more; what is left then is cancelled."""
        last = {beside, *self._reports}
        await asyncio.wait(last, timeout=seconds)
        for late in last:
            late.cancel()
        await asyncio.wait(last, timeout=1)

    async def release(self, leases: Sequence[Lease]) -> None:
        """Hand shards back, and return once that is so."""
        try:
            await self._reach.insist(lambda: self._engine.release(leases), self._seconds)
        except EngineAway:
            logger.warning("%d shards go back only when their leases run out", len(leases))
            metrics.SHARDS.labels(outcome="lost").inc(len(leases))
        except Exception:
            logger.exception("%d shards could not be handed back", len(leases))
        else:
            metrics.SHARDS.labels(outcome="released").inc(len(leases))

    async def _commit(self, lease: Lease, counts: NDArray[np.int64]) -> None:
        try:
            counted = await self._reach.insist(
                lambda: self._engine.commit(lease, counts.tolist()), self._seconds
            )
        except ValueError as error:
            logger.error("votes were refused: %s", error, extra=about([lease.job]))
            await self._fail(lease, _problem(lease, error))
        else:
            metrics.SHARDS.labels(outcome="committed" if counted else "refused").inc()

    async def _fail(self, lease: Lease, problem: Problem) -> None:
        await self._reach.insist(
            lambda: self._engine.fail(lease, problem.document()), self._seconds
        )
        metrics.SHARDS.labels(outcome="failed").inc()

    def _report(self, report: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_logged(report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)


def _problem(lease: Lease, error: Exception) -> Problem:
    """What the job's caller is told should this attempt be the last."""
    if isinstance(error, ModelUnavailable):
        return TaskUnusable(str(error), job=lease.job.id)
    detail = f"The same rows failed {FAILURES_ALLOWED} times: {type(error).__name__}."
    return ShardDead(detail, job=lease.job.id)


async def _logged(report: Coroutine[Any, Any, None]) -> None:
    try:
        await report
    except (EngineAway, asyncio.CancelledError):
        metrics.SHARDS.labels(outcome="lost").inc()
    except Exception:
        logger.exception("the outcome of a shard could not be reported")
