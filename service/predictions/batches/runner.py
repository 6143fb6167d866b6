"""Works on open batches: a few of each one's images are questions in the queue at any time."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Protocol

from service.background import sleep_or_stop
from service.engine.connection import UNREACHABLE, EngineUnreachable
from service.errors import Backlog, JobLost, NotFound, Problem, QuotaExceeded, TaskNotReady
from service.jobs import JobStatus, State
from service.predictions.batches.store import Batch, BatchStore
from service.predictions.service import Predictions

logger = logging.getLogger("vouchsafe")

OPEN_JOBS = 8
"""Most images of one batch that are questions at once."""
POLL_SECONDS = 0.5
"""Seconds between two searches for open batches."""
SWEEP_SECONDS = 60.0
"""Seconds between two searches for batches past their time."""
LONGEST_PAUSE = 60.0
"""Most seconds before a question that was not admitted is submitted again."""
_UNREACHABLE_SECONDS = 1.0
_WAIT_SECONDS = 600.0
_LATER = (Backlog, JobLost, QuotaExceeded, TaskNotReady)
"""Problems of a question that may be submitted again."""


class Held(Protocol):
    """A lock of this process."""

    @property
    def is_held(self) -> bool:
        """Whether this process may still work on the batch."""


Acquire = Callable[[str], AbstractAsyncContextManager[Held | None]]
"""Holds a batch's lock; None if another process holds it. Raises EngineUnreachable."""


class BatchRunner:
    """Submits the images of open batches, and stores a line for each.

    Any number of processes may run one over the same folders; `acquire` excludes the others of a
    fleet from a batch. A batch whose process is killed is taken up by another process. Its jobs
    are found by their Idempotency-Keys, so that no row is computed again.
    """

    def __init__(self, predictions: Predictions, store: BatchStore, acquire: Acquire) -> None:
        self._predictions, self._store, self._acquire = predictions, store, acquire

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`; open batches can go on later."""
        taken: dict[str, asyncio.Task[None]] = {}
        next_sweep = 0.0
        try:
            while not stop.is_set():
                try:
                    for batch in await asyncio.to_thread(self._store.open):
                        if batch.run not in taken or taken[batch.run].done():
                            taken[batch.run] = asyncio.create_task(self._take(batch))
                    if time.monotonic() > next_sweep:
                        next_sweep = time.monotonic() + SWEEP_SECONDS
                        taken = {run: task for run, task in taken.items() if not task.done()}
                        await asyncio.to_thread(self._store.discard_old)
                        await self.erase_discarded()
                except Exception:
                    logger.exception("batches cannot be read; trying again")
                await sleep_or_stop(stop, POLL_SECONDS)
        finally:
            for task in taken.values():
                task.cancel()
            await asyncio.gather(*taken.values(), return_exceptions=True)

    async def erase_discarded(self) -> None:
        """Erase discarded batches with their jobs; those that the engine cannot delete wait."""
        for trash, jobs in (await asyncio.to_thread(self._store.discarded)).items():
            with suppress(*UNREACHABLE):
                for job_id in jobs:
                    await self._predictions.engine.delete(job_id)
                await asyncio.to_thread(self._store.erase, trash)

    async def _take(self, batch: Batch) -> None:
        """Work on the batch while its lock is held, if a worker is alive and the lock is free."""
        try:
            if not (await self._predictions.engine.capacity()).digests:
                return
            async with self._acquire(batch.run) as lock:
                if lock is None:
                    return
                working = asyncio.create_task(self._work(batch))
                try:
                    while lock.is_held and not working.done():
                        await asyncio.wait({working}, timeout=_UNREACHABLE_SECONDS)
                finally:
                    working.cancel()
                    await asyncio.gather(working, return_exceptions=True)
        except (EngineUnreachable, *UNREACHABLE) as error:
            logger.debug("batch %s waits: %s", batch.id, error)

    async def _work(self, batch: Batch) -> None:
        """Store a line for each image that has none, then the batch's end."""
        try:
            if await asyncio.to_thread(self._store.get, batch.id) != batch:
                return  # It has ended before its lock was held, or was deleted.
            done = await asyncio.to_thread(self._store.done, batch)
            waiting = iter([index for index in range(len(batch.names)) if index not in done])

            async def answer_some() -> None:
                for index in waiting:
                    await self._answer(batch, index)

            async with asyncio.TaskGroup() as group:
                for _ in range(OPEN_JOBS):
                    group.create_task(answer_some())
            await asyncio.to_thread(self._store.finish, batch)
        except (FileNotFoundError, NotFound):
            pass  # The batch was deleted.
        except Exception:
            logger.exception("batch %s cannot be worked on; trying again", batch.id)

    async def _answer(self, batch: Batch, index: int) -> None:
        """Store the image's line once its question is answered."""
        while True:
            try:
                line = await self._line(batch, index)
                await asyncio.to_thread(self._store.add_line, batch, index, line)
                return
            except FileNotFoundError:
                return  # The batch was deleted, or another process has stored the line.
            except _LATER as problem:
                pause = min(problem.retry_after or _UNREACHABLE_SECONDS, LONGEST_PAUSE)
            except UNREACHABLE as error:
                logger.debug("batch %s waits: %s", batch.id, error)
                pause = _UNREACHABLE_SECONDS
            await asyncio.sleep(pause)

    async def _line(self, batch: Batch, index: int) -> bytes:
        """The image's line: its answer, or the problem that it has for good."""
        line: dict[str, Any] = {"index": index, "name": batch.names[index]}
        status: JobStatus | None = None
        try:
            status = await self._last_status(batch, index)
            result = await self._predictions.to_response(status)
            line |= {"state": State.SUCCEEDED, "result": result.model_dump(mode="json")}
        except (*_LATER, *UNREACHABLE):
            raise
        except Exception as error:
            problem = error
            if not isinstance(problem, Problem):
                logger.exception("image %d of batch %s has no answer", index, batch.id)
                problem = Problem("The service failed; its log has the reason")
            is_cancelled = status is not None and status.state is State.CANCELLED
            state = State.CANCELLED if is_cancelled else State.FAILED
            line |= {"state": state, "problem": problem.document()}
        return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    async def _last_status(self, batch: Batch, index: int) -> JobStatus:
        """The last status of the image's job, which is queued unless it was before."""
        image = await asyncio.to_thread(self._store.image, batch, index)
        key = f"batch:{batch.run}:{index}"
        job_id = await self._predictions.submit(batch.question(image), batch.owner, key)
        del image
        try:
            await asyncio.to_thread(self._store.add_job, batch, job_id)
        except FileNotFoundError:
            await self._predictions.engine.delete(job_id)
            raise
        status = None
        while status is None:
            status = await self._predictions.ended(job_id, _WAIT_SECONDS)
        return status
