"""The probes, and the coroutines that must be alive for the process to be ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, TypeVar

from models.bundle import Bundle
from service.background import BackgroundTasks
from service.engine.connection import ConnectionState
from service.engine.protocol import Capacity, Engine, EngineStats

T = TypeVar("T")

_ENGINE_SECONDS = 2.0
_DISK_SECONDS = 2.0
_NO_WORKER = "no live worker serves any task"
_log = logging.getLogger("vouchsafe")


class Condition(NamedTuple):
    """What a probe reports: whether the process is well, and what it waits for or lacks."""

    is_well: bool
    detail: str = ""


class Health:
    """What the probes report.

    `waiting_for` says what else the process waits for. `connection_state` is marked down where the
    engine does not answer; its giver marks it up again. `open_jobs` counts the adaptation jobs that
    have not ended; it blocks on the disk. With `workers_elsewhere` a process is well without a live
    worker, for it answers for jobs that ended; `ready` then says that none serves.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Mapping[str, Bundle],
        background: BackgroundTasks,
        waiting_for: Callable[[], str] = str,
        connection_state: ConnectionState | None = None,
        open_jobs: Callable[[], int] | None = None,
        *,
        workers_elsewhere: bool = False,
    ) -> None:
        self._engine = engine
        self._tasks = tasks
        self._background = background
        self._waiting_for = waiting_for
        self._connection_state = connection_state or ConnectionState()
        self._owns_state = connection_state is None
        self._open_jobs = open_jobs
        self._workers_elsewhere = workers_elsewhere
        self._was_ready = False

    async def ready(self) -> Condition:
        """The process can answer: its background tasks and engine live, and its worker serves."""
        if not self._background.started:
            return Condition(False, "the service is starting or stopping")
        if not self._background.all_alive:
            return Condition(False, "a part of the service has ended")
        if waiting_for := self._waiting_for():
            return Condition(False, waiting_for)
        capacity = await self.capacity()
        if capacity is None:
            return Condition(False, "the engine does not answer")
        served = any(capacity.digests_of(task, bundle) for task, bundle in self._tasks.items())
        if not served and not self._workers_elsewhere:
            return Condition(False, _NO_WORKER)
        self._was_ready = True
        return Condition(True, "" if served else _NO_WORKER)

    async def startup(self) -> Condition:
        """Ready once; without a worker of its own it has started when it can be asked."""
        if self._was_ready or (self._background.started and self._workers_elsewhere):
            return Condition(True)
        return await self.ready()

    async def capacity(self) -> Capacity | None:
        """The engine's capacity, or None where it does not answer in time."""
        return await self._answer(self._engine.capacity())

    async def stats(self) -> EngineStats | None:
        """How the engine's queue stands, or None where it does not answer in time."""
        return await self._answer(self._engine.stats())

    async def open_jobs(self) -> float | None:
        """Adaptation jobs that have not ended: None where nobody counts them, NaN for trouble."""
        if self._open_jobs is None:
            return None
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                return await asyncio.to_thread(self._open_jobs)
        except OSError:  # TimeoutError is one.
            return float("nan")

    async def _answer(self, call: Awaitable[T]) -> T | None:
        asked = time.monotonic()
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                answer = await call
        except Exception as error:
            self._connection_state.mark_down(error, asked)
            return None
        if self._owns_state:
            self._connection_state.mark_up()
        return answer
