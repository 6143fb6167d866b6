"""A worker's way to its engine: what to do while that does not answer."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError

from service.background import sleep_or_stop

logger = logging.getLogger("vouchsafe")

T = TypeVar("T")

LEAVING_SECONDS = 5.0
"""How long an engine that does not answer may hold up a worker that is told to stop."""
UNREACHABLE = (OSError, RedisError)
"""What an engine raises that is out of reach, or that cannot do now what it is asked."""


class EngineUnreachable(RuntimeError):
    """The engine did not answer, or could not do what it was asked; the log has been told."""


class EngineConnection:
    """Asks the engine of a worker: outages are told once and waited out, until it is to leave."""

    def __init__(self, state: ConnectionState | None = None) -> None:
        self.state = state or ConnectionState()
        self.leaving = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    def leave(self) -> None:
        """From here on nothing is asked twice, nor for more than LEAVING_SECONDS."""
        if not self.leaving.is_set():
            self.leaving.set()
            for limit in self._limits:
                limit.reschedule(_leaving_ends())

    async def ask(self, call: Awaitable[T]) -> T:
        """What the engine answers; raises EngineUnreachable where it does not."""
        asked = time.monotonic()
        limit = asyncio.timeout_at(_leaving_ends() if self.leaving.is_set() else None)
        try:
            async with limit:
                self._limits.add(limit)
                answer = await call
        except UNREACHABLE as error:
            self.state.mark_down(error, asked)
            raise EngineUnreachable(f"{error}") from error
        finally:
            self._limits.discard(limit)
        self.state.mark_up()
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
        await sleep_or_stop(self.leaving, seconds)


def _leaving_ends() -> float:
    return asyncio.get_running_loop().time() + LEAVING_SECONDS


class ConnectionState:
    """Whether the engine is out of reach: a line in the log as that begins, and one at its end."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._answered = float("-inf")

    @property
    def is_down(self) -> bool:
        """Whether the engine did not answer when it was last asked."""
        return self._since is not None

    def mark_down(self, error: Exception, asked: float) -> None:
        """What was asked then (time.monotonic) has no answer, and nothing asked since has one."""
        if self._since is None and self._answered <= asked:
            self._since = time.monotonic()
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            logger.warning("the engine is out of reach (%s); trying until it answers", reason)

    def mark_up(self) -> None:
        """The engine has answered."""
        self._answered = time.monotonic()
        if self._since is not None:
            logger.info("the engine answers again after %.0f s", self._answered - self._since)
            self._since = None
