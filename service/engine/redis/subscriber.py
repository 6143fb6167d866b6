"""Receives what other processes publish, over one subscribed connection for all listeners."""

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
    """Notifies a channel's signal at each message, and at each subscription.

    Messages published while the connection was lost are missed, so a listener must check its state
    after every notification. The channel `always` stays subscribed.
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
        """Whether the subscribed connection has had a reply and is not known to be lost.

        A closed connection is detected at once, a dead one after some seconds of silence.
        """
        connection = None if self._answered is None else self._answered.connection
        return connection is not None and bool(connection.is_connected)

    @property
    def always(self) -> Signal:
        """The signal of the channel that stays subscribed."""
        self._start()
        return self._always

    @asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[Signal]:
        """The channel's signal, subscribed within the context."""
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
        """Stop reading; no signal is notified from then on, and no task is left."""
        self._closing = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    def _start(self) -> None:
        if not self._closing and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        failures = 0
        while not self._closing:  # The client may lose a cancellation as it connects.
            began = asyncio.get_running_loop().time()
            try:
                async with self._redis.pubsub() as pubsub:
                    await self._hear(pubsub)
            except (RedisError, OSError, RuntimeError) as error:
                # RuntimeError: the connection was lost as a subscription was sent, so two tasks
                # read it. Callers report an outage; a rejection of SUBSCRIBE is logged here, once.
                quiet = failures or isinstance(error, _OUTAGES)
                level = logging.DEBUG if quiet else logging.WARNING
                _log.log(level, "the subscription to Redis failed: %s; trying again", error)
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
                elif clock() >= limit:  # A connection may be dead without being closed.
                    if pinged and self.steady:
                        raise TimeoutError("no reply to a PING")
                    if self.steady:  # Otherwise the client is reconnecting.
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
