"""Hears what other processes publish: one subscribed connection, however many listen."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from service.engine_redis.client import BACKOFF
from service.ledger import Bell

_log = logging.getLogger("vouchsafe.engine")


class Listener:
    """Rings a bell for each message of a channel, and each time that it is subscribed (anew).

    What was published while the connection was lost is not heard, so whoever listens looks again
    after every ring. The channel `always` is listened to as long as any.
    """

    def __init__(self, redis: Redis, always: str) -> None:
        self._redis = redis
        self._always = Bell()
        self._bells: dict[bytes, Bell] = {always.encode(): self._always}
        self._listeners: Counter[bytes] = Counter()
        self._pubsub: PubSub | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def always(self) -> Bell:
        """The bell of the channel that is always listened to."""
        self._start()
        return self._always

    @asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[Bell]:
        """The channel's bell, for as long as the context lasts."""
        name = channel.encode()
        bell = self._bells.setdefault(name, Bell())
        self._listeners[name] += 1
        self._start()
        if self._listeners[name] == 1 and self._pubsub is not None:
            with suppress(RedisError, OSError):  # The reader subscribes it when it reconnects.
                await self._pubsub.subscribe(name)
        try:
            yield bell
        finally:
            await self._leave(name)

    async def close(self) -> None:
        """Hear no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def _start(self) -> None:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())

    async def _leave(self, name: bytes) -> None:
        self._listeners[name] -= 1
        if self._listeners[name]:
            return
        del self._listeners[name], self._bells[name]
        if self._pubsub is not None:
            with suppress(RedisError, OSError):
                await self._pubsub.unsubscribe(name)

    async def _read(self) -> None:
        failures = 0
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(*self._bells)
                    self._pubsub = pubsub
                    async for message in pubsub.listen():
                        failures = 0
                        if bell := self._bells.get(message["channel"]):
                            bell.ring()
            except (RedisError, OSError) as error:
                _log.warning("Redis is not heard: %s", error)
            finally:
                self._pubsub = None
            failures += 1
            await asyncio.sleep(BACKOFF.compute(failures))
