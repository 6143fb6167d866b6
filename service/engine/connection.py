"""A worker's way to its engine: what to do while that does not answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.engine.outage import AWAY, Outage
from service.operations.health import passed

T = TypeVar("T")

LEAVING_SECONDS = 5.0
"""How long an engine that does not answer may hold up a worker that is told to stop."""


class EngineAway(RuntimeError):
    """The engine did not answer, or could not do what it was asked; the log has been told."""


class Reach:
    """Asks the engine of a worker: outages are told once and waited out, until it is to leave."""

    def __init__(self, outage: Outage | None = None) -> None:
        self.outage = outage or Outage()
        self.leaving = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    def leave(self) -> None:
        """From here on nothing is asked twice, nor for more than LEAVING_SECONDS."""
        if not self.leaving.is_set():
            self.leaving.set()
            for limit in self._limits:
                limit.reschedule(_leaving_ends())

    async def ask(self, call: Awaitable[T]) -> T:
        """What the engine answers; raises EngineAway where it does not."""
        asked = time.monotonic()
        limit = asyncio.timeout_at(_leaving_ends() if self.leaving.is_set() else None)
        try:
            async with limit:
                self._limits.add(limit)
                answer = await call
        except AWAY as error:
            self.outage.begin(error, asked)
            raise EngineAway(f"{error}") from error
        finally:
            self._limits.discard(limit)
        self.outage.end()
        return answer

    async def insist(self, call: Callable[[], Awaitable[T]], seconds: float) -> T:
        """The engine's answer, asking again for so many seconds; raises what it then raises.

        A ValueError is an answer, and raised at once.
        """
        deadline = time.monotonic() + seconds
        failures = 0
        while True:
            try:
                return await self.ask(call())
            except ValueError:
                raise
            except Exception:
                if self.leaving.is_set() or time.monotonic() > deadline:
                    raise
                await self.pause(failures)
                failures += 1

    async def pause(self, failures: int) -> None:
        """Wait before the next try: twice as long each time, up to 5 s, jittered."""
        seconds = min(5.0, 0.05 * 2.0**failures) * random.uniform(0.5, 1)
        await passed(self.leaving, seconds)


def _leaving_ends() -> float:
    return asyncio.get_running_loop().time() + LEAVING_SECONDS
