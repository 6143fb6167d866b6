"""Reports the outcomes of a worker's shards to the engine, while the next batch computes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.kinds import NoGradients
from service.engine.connection import EngineConnection, EngineUnreachable
from service.engine.protocol import FAILURES_ALLOWED, Engine, Lease
from service.errors import Problem, ShardDead, TaskUnusable, as_json
from service.operations import metrics
from service.operations.logs import about
from service.worker.model import ModelUnavailable

logger = logging.getLogger("vouchsafe.worker")


class Reporter:
    """Reports of one worker, each sent in a separate task and retried for `seconds`."""

    def __init__(self, engine: Engine, connection: EngineConnection, seconds: float) -> None:
        self._engine = engine
        self._connection = connection
        self._seconds = seconds
        self._reports: set[asyncio.Task[None]] = set()

    def commit(self, lease: Lease, counts: NDArray[np.int64], result: bytes = b"") -> None:
        """Report the shard's votes (K,), and a demonstration's result."""
        self._report(self._commit(lease, counts, result))

    def fail(self, lease: Lease, error: Exception) -> None:
        """Report that the shard's attempt failed with this error."""
        self._report(self._fail(lease, _problem(lease, error)))

    def release(self, leases: Sequence[Lease]) -> None:
        """Release shards uncomputed."""
        if leases:
            self._report(self.release_now(leases))

    async def finish(self, seconds: float, extra: asyncio.Task[None] | None = None) -> None:
        """Wait for all reports and the `extra` task; cancel those left after `seconds`."""
        last = asyncio.gather(*self._reports, *([extra] if extra else []), return_exceptions=True)
        await asyncio.wait({last}, timeout=seconds)
        last.cancel()
        await asyncio.wait({last}, timeout=1)

    async def release_now(self, leases: Sequence[Lease]) -> None:
        """Release shards, and return once the engine has confirmed it or retries have failed."""
        if not leases:
            return
        try:
            await self._connection.insist(lambda: self._engine.release(leases), self._seconds)
        except EngineUnreachable:
            logger.warning(
                "the engine is unreachable; the leases of %d shards will expire", len(leases)
            )
            metrics.SHARDS.labels(outcome="lost").inc(len(leases))
        except Exception:
            logger.exception(
                "%d shards could not be released; their leases will expire", len(leases)
            )
        else:
            metrics.SHARDS.labels(outcome="released").inc(len(leases))

    async def _commit(self, lease: Lease, counts: NDArray[np.int64], result: bytes) -> None:
        try:
            counted = await self._connection.insist(
                lambda: self._engine.commit(lease, counts.tolist(), result), self._seconds
            )
        except ValueError as error:
            logger.error(
                "the engine rejected the votes of a shard: %s", error, extra=about([lease.job])
            )
            await self._fail(lease, _problem(lease, error))
        else:
            metrics.SHARDS.labels(outcome="committed" if counted else "refused").inc()

    async def _fail(self, lease: Lease, problem: Problem) -> None:
        await self._connection.insist(
            lambda: self._engine.fail(lease, problem.document()), self._seconds
        )
        metrics.SHARDS.labels(outcome="failed").inc()

    def _report(self, report: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_logged(report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)


def _problem(lease: Lease, error: Exception) -> Problem:
    """The problem of the job, if this attempt is the last."""
    if isinstance(error, ModelUnavailable):
        return TaskUnusable(str(error), job=lease.job.id)
    if isinstance(error, NoGradients):
        detail = (
            f"Task {as_json(lease.job.task)} cannot be attacked: its networks have no gradients"
        )
        return ShardDead(detail, job=lease.job.id)
    detail = f"The same rows failed {FAILURES_ALLOWED} times: {type(error).__name__}."
    return ShardDead(detail, job=lease.job.id)


async def _logged(report: Coroutine[Any, Any, None]) -> None:
    try:
        await report
    except (EngineUnreachable, asyncio.CancelledError):
        metrics.SHARDS.labels(outcome="lost").inc()
    except Exception:
        logger.exception("the outcome of a shard could not be reported; its lease will expire")
