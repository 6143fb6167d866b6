"""Locks of adaptation jobs and of batches: the process that holds a job's lock runs the job."""

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
"""Seconds after which the lock of a dead worker expires."""
EXTEND, KEEP, SILENCE = 1 / 6, 1 / 2, 1 / 4
"""Shares of a lock's time: between two extensions, from the last extension until the job is
abandoned, and from the last step until its process exits."""


class HeldLock:
    """A lock that this process holds until `until` (time.monotonic), or forever."""

    def __init__(self, until: float = math.inf) -> None:
        self.until = until

    @property
    def is_held(self) -> bool:
        """Whether this process may still run the job."""
        return time.monotonic() < self.until


class Locks(Protocol):
    """The locks of all jobs; after `silence` seconds without a step, a job's process exits."""

    silence: float | None

    def acquire(self, task_id: str) -> AbstractAsyncContextManager[HeldLock | None]:
        """Hold a job's lock; None if another process holds it. Raises EngineUnreachable."""


class LocalLocks:
    """Locks of one machine: always free, since a file lock in the job's folder is enough."""

    silence: float | None = None

    @asynccontextmanager
    async def acquire(self, task_id: str) -> AsyncIterator[HeldLock | None]:
        """A lock that is never lost."""
        yield HeldLock()


class RedisLocks:
    """Locks of a fleet's jobs of one `kind`; `connection` logs when Redis is unreachable.

    A lock expires `seconds` after its last extension. Its holder abandons the job after half of
    that, and the job's process exits without steps after a quarter. So no process of the job is
    left when the lock expires.
    """

    def __init__(
        self,
        redis: Redis,
        connection: EngineConnection | None = None,
        *,
        seconds: float = LOCK_SECONDS,
        prefix: str = PREFIX,
        kind: str = "adaptation",
    ) -> None:
        self.silence: float | None = seconds * SILENCE
        self._redis = redis
        self._connection = connection or EngineConnection()
        self._seconds = seconds
        self._prefix = f"{prefix}{kind}:"

    @asynccontextmanager
    async def acquire(self, task_id: str) -> AsyncIterator[HeldLock | None]:
        """Hold the job's lock, and extend it; None if another worker holds it."""
        name = f"{self._prefix}{task_id}"
        lock = self._redis.lock(name, timeout=self._seconds, blocking=False, thread_local=False)
        held = HeldLock(time.monotonic() + self._seconds * KEEP)
        if not await self._connection.ask(lock.acquire()):
            yield None
            return
        extending = asyncio.create_task(self._extend(lock, held, task_id))
        try:
            yield held
        finally:
            while not extending.done():  # redis-py may swallow a cancellation.
                extending.cancel()
                await asyncio.wait({extending}, timeout=1.0)
            with suppress(EngineUnreachable):  # The lock expires then.
                await self._connection.ask(_owned(lock.release()))

    async def aclose(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    async def _extend(self, lock: Lock, held: HeldLock, task_id: str) -> None:
        """Extend the lock until it is lost, or cannot be extended in time."""
        while held.is_held:
            await asyncio.sleep(self._seconds * EXTEND)
            began = time.monotonic()
            with suppress(EngineUnreachable):
                is_owned = await self._connection.ask(answered(_owned(lock.reacquire())))
                held.until = began + self._seconds * KEEP if is_owned else 0.0
        logger.warning("the lock of job %s is lost", task_id, extra=naming(task_id=task_id))


async def _owned(request: Awaitable[object]) -> bool:
    """Whether this process still held the lock when Redis extended or released it."""
    try:
        await request
    except LockError:
        return False
    return True
