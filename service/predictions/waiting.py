"""Waits for the ends of jobs: one subscription a job, for every caller of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from service.engine.connection import UNREACHABLE
from service.engine.protocol import RETRY_SECONDS, Engine
from service.errors import Backlog, JobCancelled, JobLost, NotFound
from service.jobs import Job, JobStatus

T = TypeVar("T")

_UNREACHABLE_SECONDS = 1.0
"""Seconds between two calls of an engine that is unreachable."""


class JobWaiter:
    """Watches this process's jobs until they end.

    `on_end` is called with the last status of each watched job. `is_shared` means that jobs
    outlive this process.
    """

    def __init__(
        self, engine: Engine, on_end: Callable[[JobStatus], None], *, is_shared: bool
    ) -> None:
        self._engine, self._on_end, self._is_shared = engine, on_end, is_shared
        self._watched: dict[str, tuple[Job, asyncio.Task[JobStatus]]] = {}
        self.draining = asyncio.Event()
        self._deleting: set[asyncio.Task[bool]] = set()

    @property
    def jobs(self) -> list[Job]:
        """The jobs being watched, without their pixels."""
        return [job for job, _ in self._watched.values()]

    def watch(self, job: Job) -> None:
        """Watch the job until it ends, once for all callers of this process."""
        watching = asyncio.create_task(_once_reachable(partial(self._last_status, job.id)))
        self._watched[job.id] = replace(job, pixels=b""), watching
        watching.add_done_callback(partial(self._ended, job.id))

    async def ended(
        self,
        job_id: str,
        seconds: float,
        leaving: Callable[[], Coroutine[Any, Any, None]] | None,
    ) -> JobStatus | None:
        """The job's last status, or None; see `Predictions.ended`."""
        if not seconds:
            return None
        ending = self._ending(job_id)
        gone = asyncio.create_task(leaving()) if leaving is not None else None
        draining = asyncio.create_task(self.draining.wait())
        tasks: set[asyncio.Future[Any]] = {task for task in (ending, gone, draining) if task}
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done() and gone is not None and gone.done():
                await self._engine.cancel(job_id)
                raise JobCancelled("The caller left before the answer was ready", job=job_id)
            if not ending.done() and draining.done():
                detail = "This process is stopping; send the request again"
                if self._is_shared:
                    detail = f"This process is stopping; the job {job_id} goes on: request it"
                raise Backlog(detail, retry_after=RETRY_SECONDS, job=job_id)
            return ending.result() if ending.done() else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def delete(self, job_id: str) -> None:
        """Delete the job in the engine; while that is unreachable, deletion goes on behind."""
        deleting = asyncio.create_task(_once_reachable(partial(self._engine.delete, job_id)))
        self._deleting.add(deleting)
        deleting.add_done_callback(self._deleting.discard)
        await asyncio.wait({deleting}, timeout=_UNREACHABLE_SECONDS)

    def drain(self, grace_seconds: float) -> None:
        """Make `ended` raise Backlog after the grace for jobs that have not ended."""
        asyncio.get_running_loop().call_later(grace_seconds, self.draining.set)

    async def close(self) -> None:
        """Stop watching jobs, and drop deletions that are not done."""
        watching = [watching for _, watching in self._watched.values()]
        tasks: list[asyncio.Task[Any]] = [*watching, *self._deleting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, job_id: str, watching: asyncio.Task[JobStatus]) -> None:
        del self._watched[job_id]
        if not watching.cancelled() and watching.exception() is None:
            self._on_end(watching.result())

    def _ending(self, job_id: str) -> asyncio.Future[JobStatus]:
        """A future of the job's last status."""
        if job_id in self._watched:
            return asyncio.shield(self._watched[job_id][-1])
        return asyncio.create_task(self._last_status(job_id))

    async def _last_status(self, job_id: str) -> JobStatus:
        last = None
        async for status in self._engine.watch(job_id):
            last = status
        if last is None:
            raise NotFound("There is no such job, or no longer")
        if not last.state.ended:
            raise job_lost(job_id)
        return last


def job_lost(job_id: str) -> JobLost:
    """The problem of an accepted job that the engine no longer has."""
    detail = "The queue was lost, and the job with it; send the request again"
    return JobLost(detail, retry_after=1, job=job_id)


async def _once_reachable(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The call's result; the call is repeated while the engine is unreachable."""
    while True:
        try:
            return await call()
        except UNREACHABLE:
            await asyncio.sleep(_UNREACHABLE_SECONDS)
