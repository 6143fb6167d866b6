"""Coroutines that run for the lifetime of a process, beside its main work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

_log = logging.getLogger("vouchsafe")

Companion = Callable[[asyncio.Event], Coroutine[Any, Any, None]]
"""Called with an event that is set at shutdown; runs until then, and ends by itself soon after."""


async def passed(stop: asyncio.Event, seconds: float) -> None:
    """Returns after so many seconds, or at once when a companion is told to stop."""
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


class Companions:
    """Runs companions for the lifetime of the app."""

    def __init__(self, companions: Sequence[Companion], grace_seconds: float) -> None:
        self._companions = companions
        self._grace_seconds = grace_seconds
        self._running: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self.started = False

    def __len__(self) -> int:
        return len(self._companions)

    def start(self) -> None:
        """Start them all."""
        self._stop = asyncio.Event()
        self._running = [asyncio.create_task(self._run(start)) for start in self._companions]
        self.started = True

    async def stop(self) -> None:
        """Ask them to stop, wait for the grace time, then cancel whoever is left."""
        self.started = False
        self._stop.set()
        if self._running:
            await asyncio.wait(self._running, timeout=self._grace_seconds)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    @property
    def all_alive(self) -> bool:
        """Whether every companion is still running."""
        return self.started and not any(task.done() for task in self._running)

    async def _run(self, companion: Companion) -> None:
        try:
            await companion(self._stop)
        except Exception:
            _log.exception("A companion of the service failed; the process is not ready any more")
