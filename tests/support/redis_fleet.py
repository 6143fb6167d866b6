"""The engine over Redis, and steps that tests take with it."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from redis.asyncio import Redis

from benchmarks.redis_server import age
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.engine.redis.subscriber import Subscriber
from service.jobs import State
from tests.support.engines import SHARD_ROWS, status_of
from tests.support.fakes import FakeClock

LEASE_MS = 30_000


class Fleet:
    """An engine under a prefix of its own, and a plain client of the same server."""

    def __init__(self, url: str, **options: Any) -> None:
        self.prefix = f"{{{secrets.token_hex(8)}}}:"
        self.redis = connect(url)
        own = {"poll_seconds": 0.05, "sweep_seconds": 0.001, "clock": None}
        own |= {name: options.pop(name) for name in own.keys() & options}
        chosen = EngineOptions(**{"shard_rows": SHARD_ROWS} | options)
        self.engine = RedisEngine(connect(url), chosen, prefix=self.prefix, **own)

    async def lease_runs_out(self) -> None:
        await age(self.redis, self.prefix, LEASE_MS + 1)

    async def keys(self, kind: str = "") -> list[bytes]:
        return [key async for key in self.redis.scan_iter(match=f"{self.prefix}{kind}*")]

    async def lengths(self) -> list[int]:
        return [await self.redis.xlen(key) for key in await self.keys("lane:")]

    async def close(self) -> None:
        await self.engine.close()
        await self.redis.aclose()


class Rollout:
    """A fleet on a fake clock, with a job of `alpha`'s and time that passes between looks."""

    def __init__(self, url: str) -> None:
        self.clock = FakeClock()
        self.fleet = Fleet(url, clock=self.clock)
        self.engine = self.fleet.engine

    async def look(self, *alive: Worker, seconds: float) -> State:
        """The job's state after that long, in which these workers alone were heard from."""
        for _ in range(round(seconds / 25)):
            self.clock.advance(25)
            await age(self.fleet.redis, self.fleet.prefix, 25_000)
            for worker in alive:
                await self.engine.pull(worker, 0)
            await self.engine.reconcile()
        return (await status_of(self.engine, "a")).state


NEWER = Worker("newer", {"default": "bundle-b"})


async def steady(listener: Subscriber, wanted: bool = True) -> None:
    """Returns once the listener says so."""
    async with asyncio.timeout(60):
        while listener.steady is not wanted:  # noqa: ASYNC110 - it has nothing to wait on.
            await asyncio.sleep(0.01)


async def answer(client: Redis) -> str:
    """What a server says to a PING, be it an error."""
    try:
        return "PONG" if await client.ping() else ""
    except Exception as error:
        return type(error).__name__ + str(error).upper()
