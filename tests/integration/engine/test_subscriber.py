"""service/engine/redis/subscriber.py: what is left of it once it is closed."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from benchmarks.redis_server import RedisServer
from service.engine.redis.client import connect
from service.engine.redis.subscriber import Subscriber


class FakeConnection:
    """A subscribed connection that hears nothing; `deaf` calls of it lose their cancellation once.

    The Redis client does that as it connects, for `asyncio.wait_for` does before Python 3.12.
    `reached` is set in the call named `held`.
    """

    connection = None

    def __init__(self, held: str, *deaf: str) -> None:
        self._held, self._deaf = held, set(deaf)
        self.reached = asyncio.Event()

    def pubsub(self) -> FakeConnection:
        return self

    async def __aenter__(self) -> FakeConnection:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self._call("close")

    async def subscribe(self, *channels: bytes) -> None:
        await self._call("subscribe")

    async def get_message(self, **_: Any) -> None:
        await self._call("get_message")
        await asyncio.Event().wait()

    async def _call(self, name: str) -> None:
        if name != self._held:
            return
        self.reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if name not in self._deaf:
                raise
            self._deaf.remove(name)


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {cast("asyncio.Task[Any]", asyncio.current_task())}


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("held", ["subscribe", "get_message"])
async def test_close_leaves_no_task(held: str, deaf: bool) -> None:
    """Closed while a subscription is in flight or while it listens, also where the client loses
    the cancellation, nothing goes on."""
    connection = FakeConnection(held, *([held] if deaf else []))
    listener = Subscriber(cast(Redis, connection), "always")
    async with asyncio.timeout(60), listener.listening("changed"):
        await connection.reached.wait()
        await listener.close()
        assert not other_tasks()


async def test_a_closed_listener_stays_closed() -> None:
    """Whoever listens after the close hears nothing and starts nothing."""
    connection = FakeConnection("get_message")
    listener = Subscriber(cast(Redis, connection), "always")
    async with listener.listening("changed"):
        await connection.reached.wait()
    await listener.close()
    signal = listener.always
    async with listener.listening("changed"):
        assert not other_tasks()
    assert not signal.next.is_set()


async def test_close_ends_a_subscription_to_redis(redis_server: RedisServer) -> None:
    """Over Redis, a listener that has just changed its channels ends at once, and its connection
    is given back."""
    redis = connect(redis_server.url)
    listener = Subscriber(redis, "test-listener:always")
    async with asyncio.timeout(60):
        for wanted in range(20):
            async with listener.listening(f"test-listener:{wanted}") as signal:
                if not wanted:
                    await signal.next.wait()
        async with listener.listening("test-listener:last"):
            await asyncio.sleep(0)
            await listener.close()
    assert not other_tasks()
    await redis.aclose()
    await redis.connection_pool.disconnect()
