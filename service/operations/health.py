"""Health of a process, for its probes: background tasks, engine and workers."""

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
    """The result of a probe: whether the process is well, and what it waits for or lacks."""

    is_well: bool
    detail: str = ""


class Health:
    """Computes the results of the probes.

    - `waiting_for` returns what else the process waits for, or an empty string.
    - `connection_state` is marked down when the engine does not answer; its owner marks it up.
    - `open_jobs` counts the adaptation jobs that have not ended; it blocks on the disk.
    - With `workers_elsewhere`, a process is ready without a live worker, since it serves ended
      jobs; the detail of `ready` then reports that no worker serves.
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
        """Ready while the background tasks and the engine are alive, and a worker serves."""
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
        """Well once `ready` has been; a process without workers is well once it has started."""
        if self._was_ready or (self._background.started and self._workers_elsewhere):
            return Condition(True)
        return await self.ready()

    async def capacity(self) -> Capacity | None:
        """The engine's capacity, or None if the engine does not answer in time."""
        return await self._answer(self._engine.capacity())

    async def stats(self) -> EngineStats | None:
        """The engine's statistics, or None if the engine does not answer in time."""
        return await self._answer(self._engine.stats())

    async def open_jobs(self) -> float | None:
        """The number of open adaptation jobs: None without a counter, NaN for disk errors."""
        if self._open_jobs is None:
            return None
        try:
            async with asyncio.timeout(_DISK_SECONDS):
                return await asyncio.to_thread(self._open_jobs)
        except OSError:  # Includes TimeoutError.
            return float("nan")

    async def _answer(self, call: Awaitable[T]) -> T | None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                answer = await call
        except Exception as error:
            self._connection_state.mark_down(error, began)
            return None
        if self._owns_state:
            self._connection_state.mark_up()
        return answer
