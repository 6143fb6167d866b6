"""A worker's connection to its engine: retry, backoff, and one log record per outage."""

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
"""Seconds that an unreachable engine may delay a worker that stops."""
UNREACHABLE = (OSError, RedisError)
"""Errors of an engine that is unreachable, or that cannot run a call now."""


class EngineUnreachable(RuntimeError):
    """The engine is unreachable, or could not run the call; EngineConnection has logged it."""


class EngineConnection:
    """Calls the engine of a worker; logs an outage once, and retries until the worker leaves."""

    def __init__(self, state: ConnectionState | None = None) -> None:
        self.state = state or ConnectionState()
        self.leaving = asyncio.Event()
        self._limits: set[asyncio.Timeout] = set()

    def leave(self) -> None:
        """Stop retrying, and limit every call to LEAVING_SECONDS."""
        if not self.leaving.is_set():
            self.leaving.set()
            for limit in self._limits:
                limit.reschedule(_leaving_ends())

    async def ask(self, call: Awaitable[T]) -> T:
        """The result of one call.

        Raises EngineUnreachable where the engine is unreachable, and what else the call raises.
        """
        began = time.monotonic()
        limit = asyncio.timeout_at(_leaving_ends() if self.leaving.is_set() else None)
        try:
            async with limit:
                self._limits.add(limit)
                result = await call
        except UNREACHABLE as error:
            self.state.mark_down(error, began)
            raise EngineUnreachable(f"{error}") from error
        finally:
            self._limits.discard(limit)
        self.state.mark_up()
        return result

    async def insist(self, call: Callable[[], Awaitable[T]], seconds: float) -> T:
        """The result of `call`, retried for `seconds`.

        Raises ValueError at once, and every other error of the last try.
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
        """Wait before the next try: twice as long after each failure, up to 5 s, jittered."""
        seconds = min(5.0, 0.05 * 2.0**failures) * random.uniform(0.5, 1)
        await sleep_or_stop(self.leaving, seconds)


def _leaving_ends() -> float:
    return asyncio.get_running_loop().time() + LEAVING_SECONDS


class ConnectionState:
    """Whether the engine is down; logs one record when it goes down and one when it is back."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._last_success = float("-inf")

    @property
    def is_down(self) -> bool:
        """Whether the last call to the engine failed."""
        return self._since is not None

    def mark_down(self, error: Exception, began: float) -> None:
        """Note the `error` of a call that `began` then (time.monotonic).

        A call that succeeded since overrides the error.
        """
        if self._since is None and self._last_success <= began:
            self._since = time.monotonic()
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            logger.warning("the engine is out of reach (%s); retrying until it answers", reason)

    def mark_up(self) -> None:
        """Note a call that succeeded."""
        self._last_success = time.monotonic()
        if self._since is not None:
            logger.info("the engine answers again after %.0f s", self._last_success - self._since)
            self._since = None
