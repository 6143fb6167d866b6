"""Locks of adaptation jobs: the process that holds a job's lock runs the job."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import LockError

from service.engine.connection import EngineConnection, EngineUnreachable
from service.engine.redis.client import answered
from service.engine.redis.engine import PREFIX
from service.operations.logs import naming

logger = logging.getLogger("vouchsafe.tasks")

LOCK_SECONDS = 30.0
"""How long a lock outlives the worker that held it."""
EXTEND, KEEP, SILENCE = 1 / 6, 1 / 2, 1 / 4
"""Shares of a lock's time: between two extensions; from the last extension until the job is given
up; and for which the job's process goes on unattended."""


class HeldLock:
    """A lock that this process holds until `until` (time.monotonic), or for good."""

    def __init__(self, until: float = math.inf) -> None:
        self.until = until

    @property
    def is_held(self) -> bool:
        """Whether the job may still be run here."""
        return time.monotonic() < self.until


class Locks(Protocol):
    """The locks of all jobs; `silence` are the seconds that a job's process goes on unattended."""

    silence: float | None

    def acquire(self, task_id: str) -> AbstractAsyncContextManager[HeldLock | None]:
        """Hold a job's lock; None where another process has it. Raises EngineUnreachable."""


class LocalLocks:
    """Locks of one machine: always free, for a file in the job's folder keeps processes apart."""

    silence: float | None = None

    @asynccontextmanager
    async def acquire(self, task_id: str) -> AsyncIterator[HeldLock | None]:
        """A lock that is never lost."""
        yield HeldLock()


class RedisLocks:
    """Locks of a fleet, in Redis; `reach` asks Redis, and logs where it is out of reach.

    A lock expires `seconds` after its last extension. Its holder gives the job up after half of
    that, and the job's process ends by itself after a quarter: none is left when the lock expires.
    """

    def __init__(
        self,
        redis: Redis,
        connection: EngineConnection | None = None,
        *,
        seconds: float = LOCK_SECONDS,
        prefix: str = PREFIX,
    ) -> None:
        self.silence: float | None = seconds * SILENCE
        self._redis = redis
        self._connection = connection or EngineConnection()
        self._seconds = seconds
        self._prefix = prefix

    @asynccontextmanager
    async def acquire(self, task_id: str) -> AsyncIterator[HeldLock | None]:
        """Hold the job's lock, and extend it meanwhile; None where another worker has it."""
        name = f"{self._prefix}adaptation:{task_id}"
        lock = self._redis.lock(name, timeout=self._seconds, blocking=False, thread_local=False)
        held = HeldLock(time.monotonic() + self._seconds * KEEP)
        if not await self._connection.ask(lock.acquire()):
            yield None
            return
        extending = asyncio.create_task(self._extend(lock, held, task_id))
        try:
            yield held
        finally:
            extending.cancel()
            await asyncio.wait({extending})
            with suppress(EngineUnreachable):  # It expires then.
                await self._connection.ask(_owned(lock.release()))

    async def aclose(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    async def _extend(self, lock: Lock, held: HeldLock, task_id: str) -> None:
        """Extend the lock until it is lost, or could not be extended in time."""
        while held.is_held:
            await asyncio.sleep(self._seconds * EXTEND)
            asked = time.monotonic()
            with suppress(EngineUnreachable):
                is_owned = await self._connection.ask(answered(_owned(lock.reacquire())))
                held.until = asked + self._seconds * KEEP if is_owned else 0.0
        logger.warning("the lock of job %s is lost", task_id, extra=naming(task_id=task_id))


async def _owned(asking: Awaitable[object]) -> bool:
    """Whether the lock was still this process's as Redis was asked to extend or release it."""
    try:
        await asking
    except LockError:
        return False
    return True
