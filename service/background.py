"""Coroutines that run for the lifetime of a process, beside its main work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

_log = logging.getLogger("vouchsafe")

BackgroundTask = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""A coroutine function that takes the shutdown event and returns soon after the event is set."""


async def sleep_or_stop(stop: asyncio.Event, seconds: float) -> None:
    """Returns after `seconds`, or as soon as `stop` is set."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


class BackgroundTasks:
    """The background tasks of a process, from `start` to `stop`.

    `stop` waits `grace_seconds` for the tasks to return.
    """

    def __init__(self, tasks: Sequence[BackgroundTask], grace_seconds: float) -> None:
        self._tasks = tasks
        self._grace_seconds = grace_seconds
        self._running: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self.started = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self) -> None:
        """Start all background tasks."""
        self._stop = asyncio.Event()
        self._running = [asyncio.create_task(self._run(task)) for task in self._tasks]
        self.started = True

    async def stop(self) -> None:
        """Set the shutdown event, wait `grace_seconds`, then cancel the tasks that still run."""
        self.started = False
        self._stop.set()
        if self._running:
            await asyncio.wait(self._running, timeout=self._grace_seconds)
        for running in self._running:
            running.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    @property
    def all_alive(self) -> bool:
        """Whether every background task is still running."""
        return self.started and not any(running.done() for running in self._running)

    async def _run(self, task: BackgroundTask) -> None:
        try:
            await task(self._stop)
        except Exception:
            _log.exception("a background task failed; the process is not ready any more")
