"""Hears what other processes publish: one subscribed connection, however many listen."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError, RedisError, TimeoutError

from service.engine.redis.client import BACKOFF
from service.engine.signal import Signal

_STEADY_SECONDS = 5.0
_SILENCE_SECONDS = 5.0
_OUTAGES = (ConnectionError, TimeoutError, OSError, RuntimeError)
_log = logging.getLogger("vouchsafe.engine")


class Subscriber:
    """Rings a signal for each message of a channel, and each time that it is subscribed (anew).

    What was published while the connection was lost is not heard, so whoever listens looks again
    after every ring. The channel `always` is listened to as long as any.
    """

    def __init__(self, redis: Redis, always: str) -> None:
        self._redis = redis
        self._always = Signal()
        self._signals: dict[bytes, Signal] = {always.encode(): self._always}
        self._listeners: Counter[bytes] = Counter()
        self._altered = asyncio.Event()
        self._answered: PubSub | None = None
        self._reading: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def steady(self) -> bool:
        """Whether the subscribed connection has been answered and is not known to be lost.

        One that is cut is known at once, one that went dead after some seconds of silence.
        """
        connection = None if self._answered is None else self._answered.connection
        return connection is not None and bool(connection.is_connected)

    @property
    def always(self) -> Signal:
        """The signal of the channel that is always listened to."""
        self._start()
        return self._always

    @asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[Signal]:
        """The channel's signal, for as long as the context lasts."""
        name = channel.encode()
        signal = self._signals.setdefault(name, Signal())
        self._listeners[name] += 1
        self._start()
        self._altered.set()
        try:
            yield signal
        finally:
            self._listeners[name] -= 1
            if not self._listeners[name]:
                del self._listeners[name], self._signals[name]
                self._altered.set()

    async def close(self) -> None:
        """Hear no more: bells are silent from here on, and no task is left."""
        self._closing = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    def _start(self) -> None:
        if not self._closing and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        failures = 0
        while not self._closing:  # A cancellation may get lost where the client connects.
            began = asyncio.get_running_loop().time()
            try:
                async with self._redis.pubsub() as pubsub:
                    await self._hear(pubsub)
            except (RedisError, OSError, RuntimeError) as error:
                # RuntimeError: it was lost while a subscription was sent, and is read by two.
                # An outage is told by whoever asks; what is refused here alone, once.
                quiet = failures or isinstance(error, _OUTAGES)
                level = logging.DEBUG if quiet else logging.WARNING
                _log.log(level, "Redis is not heard: %s", error)
            if asyncio.get_running_loop().time() - began > _STEADY_SECONDS:
                failures = 0
            failures += 1
            await asyncio.sleep(BACKOFF.compute(failures))

    async def _hear(self, pubsub: PubSub) -> None:
        clock = asyncio.get_running_loop().time
        subscribed: set[bytes] = set()
        reading: asyncio.Task[Any] | None = None
        altered: asyncio.Task[Any] | None = None
        pinged, limit = False, clock() + _SILENCE_SECONDS
        self._altered.set()
        try:
            while not self._closing:
                if self._altered.is_set():
                    self._altered.clear()
                    altered = None
                    subscribed = await self._subscribe(pubsub, subscribed)
                    continue
                reading = reading or asyncio.create_task(pubsub.get_message(timeout=None))
                altered = altered or asyncio.create_task(self._altered.wait())
                await asyncio.wait(
                    {reading, altered},
                    timeout=max(0.0, limit - clock()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if reading.done():
                    message, reading = reading.result(), None
                    self._answered = pubsub
                    pinged, limit = False, clock() + _SILENCE_SECONDS
                    if message and (signal := self._signals.get(message["channel"])):
                        signal.notify()
                elif clock() >= limit:  # A connection may be dead without having been cut.
                    if pinged and self.steady:
                        raise TimeoutError("no answer to a PING")
                    if self.steady:  # Otherwise the client is making it again.
                        await pubsub.ping()
                        pinged = True
                    limit = clock() + _SILENCE_SECONDS
        finally:
            self._answered = None
            for task in (altered, reading):
                if task is not None:
                    await _end(task)

    async def _subscribe(self, pubsub: PubSub, subscribed: set[bytes]) -> set[bytes]:
        wanted = set(self._signals)
        if new := wanted - subscribed:
            await pubsub.subscribe(*new)
        if old := subscribed - wanted:
            await pubsub.unsubscribe(*old)
        return wanted


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task until it has ended: the client may lose a cancellation as it connects."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
