"""Both engines under one protocol, with told clocks, and what tests do with them."""

from __future__ import annotations

import asyncio
import gc
import secrets
from base64 import b64encode
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import pytest

from benchmarks.redis_server import age, stored_bytes
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import (
    Engine,
    Lease,
    Worker,
)
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import Domain, Job, JobStatus, Mode, State
from tests.support.fakes import FakeClock, fake_votes, make_job, true_votes

SHARD_ROWS = 10


LEASE = 20  # ticks, as are the next three


RETENTION = 1000


STARVATION = 5


WORKER_SILENCE = 50


BACKLOG_ROWS = 400


OWNER_ROWS = 120


LOOKS = (15, 20, 40)


CONTAINERS = (dict, list, tuple, set, deque, Counter)


PROBLEM = {"type": "urn:vouchsafe:problem:shard-dead", "status": 500, "detail": "as reported"}


ALPHA = Worker("alpha", {"default": "bundle-a"})


BETA = Worker("beta", {"default": "bundle-a"})


BOTH = Worker("both", {"default": "bundle-a", "birds": "bundle-b"})


NEWER = Worker("newer", {"default": "bundle-n"})


OPTIONS = EngineOptions(
    shard_rows=SHARD_ROWS,
    lease_seconds=LEASE,
    max_queue_rows=BACKLOG_ROWS,
    max_queue_rows_per_key=OWNER_ROWS,
    retention_seconds=RETENTION,
    starvation_seconds=STARVATION,
    worker_seconds=WORKER_SILENCE,
)


class Harness(Protocol):
    """An engine under test, with its time and what it stores."""

    engine: Engine
    tick: float

    async def wait(self, ticks: float) -> None:
        """Let time pass."""

    async def look(self, *alive: Worker, ticks: float) -> None:
        """Let time pass in which these workers alone announce themselves, every LEASE ticks."""

    async def stores(self, content: bytes) -> bool:
        """Whether the content still lies anywhere in the engine."""

    async def close(self) -> None:
        """Leave nothing behind."""


class MemoryHarness:
    """MemoryEngine on a clock of its own, one second a tick."""

    tick = 1.0

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.engine = MemoryEngine(
            OPTIONS,
            poll_seconds=0.02,
            clock=self.clock,
        )

    async def wait(self, ticks: float) -> None:
        self.clock.advance(ticks)

    async def look(self, *alive: Worker, ticks: float) -> None:
        for _ in range(round(ticks / LEASE)):
            await self.wait(LEASE)
            for worker in alive:
                await self.engine.pull(worker, 0)

    async def stores(self, content: bytes) -> bool:
        seen: set[int] = set()
        queue: deque[Any] = deque([self.engine])
        while queue:
            thing = queue.popleft()
            if type(thing) is bytes and content in thing:
                return True
            own = type(thing).__module__.startswith("service.")
            if id(thing) not in seen and (own or type(thing) in CONTAINERS):
                seen.add(id(thing))
                queue.extend(gc.get_referents(thing))
        return False

    async def close(self) -> None:
        pass


class RedisHarness:
    """RedisEngine under a prefix of its own, one second a tick.

    What the scripts write down is on a fake clock. Redis keeps the time of leases and of keys to
    expire by itself, so `wait` moves these on: every idle time grows, every TTL shrinks.
    """

    tick = 1.0

    def __init__(self, url: str) -> None:
        self.clock = FakeClock()
        self.prefix = f"{{{secrets.token_hex(8)}}}:"
        self.redis = connect(url)
        self.engine = RedisEngine(
            self.redis,
            OPTIONS,
            poll_seconds=0.05,
            sweep_seconds=0.001,
            prefix=self.prefix,
            clock=self.clock,
        )

    async def wait(self, ticks: float) -> None:
        self.clock.advance(ticks)
        await age(self.redis, self.prefix, round(1000 * ticks))

    async def look(self, *alive: Worker, ticks: float) -> None:
        for _ in range(round(ticks / LEASE)):
            await self.wait(LEASE)
            for worker in alive:
                await self.engine.pull(worker, 0)
            await self.engine.reconcile()

    async def stores(self, content: bytes) -> bool:
        stored = [await stored_bytes(self.redis, key) async for key in self._keys()]
        return any(content in text or b64encode(content) in text for text in stored)

    async def close(self) -> None:
        if keys := [key async for key in self._keys()]:
            await self.redis.delete(*keys)
        await self.engine.close()

    def _keys(self) -> AsyncIterator[bytes]:
        return self.redis.scan_iter(match=f"{self.prefix}*")


HARNESSES: dict[str, Callable[[pytest.FixtureRequest], Harness]] = {
    "memory": lambda request: MemoryHarness(),
    "redis": lambda request: RedisHarness(request.getfixturevalue("redis_server").url),
}


def votes(lease: Lease) -> list[int]:
    """The true votes of a leased shard."""
    shard = lease.shard
    key = lease.job.domain_key(shard.domain, lease.job.stage_of(shard))
    return fake_votes(key, range(shard.start, shard.stop), lease.job.classes)


def job_in_rounds(identity: str, **fields: Any) -> Job:
    """A job of 10 selection rows and rounds of 15, 5 and 20 estimation rows."""
    job = make_job(identity, n=LOOKS[-1], **fields)
    return replace(job, method="anytime", target_radius=0.25, looks=LOOKS)


def votes_at(job: Job, look: int) -> tuple[int, ...]:
    """The true estimation votes of the first `look` rows."""
    return tuple(fake_votes(job.domain_key(Domain.ESTIMATION), range(look), job.classes))


async def due_jobs(engine: Engine) -> list[str]:
    """The jobs whose look is due, by id."""
    return [status.job.id for status in await engine.due()]


async def compute(engine: Engine, leases: Sequence[Lease]) -> list[bool]:
    """Start and commit, as a worker does."""
    await engine.start(leases)
    return [await engine.commit(lease, votes(lease)) for lease in leases]


async def open_rows(engine: Engine, jobs: Sequence[Job]) -> int:
    """The rows that are left of these jobs."""
    statuses = [await status_of(engine, job.id) for job in jobs]
    return sum(s.job.rows - s.rows_done for s in statuses if not s.state.ended)


async def finish_everything(engine: Engine, worker: Worker = ALPHA) -> None:
    while leases := await engine.pull(worker, 50):
        await compute(engine, leases)


async def status_of(engine: Engine, job_id: str) -> JobStatus:
    status = await engine.status(job_id)
    assert status is not None
    return status


def assert_exact(status: JobStatus) -> None:
    """The job succeeded with every row counted once."""
    assert status.state is State.SUCCEEDED
    assert status.rows_done == status.job.rows
    assert status.selection == true_votes(status.job, Domain.SELECTION)
    assert status.estimation == true_votes(status.job, Domain.ESTIMATION)


def one_shard(identity: str, **fields: Any) -> Job:
    """A job of a single shard."""
    return make_job(identity, mode=Mode.PREDICT, n=SHARD_ROWS, **fields)


async def die(harness: Harness, worker: Worker = ALPHA) -> list[Lease]:
    """Pull one shard, start it, and never be heard of again."""
    leases = await harness.engine.pull(worker, 1)
    await harness.engine.start(leases)
    await harness.wait(LEASE + 1)
    return leases


async def owned(engine: Engine, owner: str | None) -> int:
    return (await engine.capacity(owner)).owner_rows


async def watched(engine: Engine, job_id: str, into: list[JobStatus]) -> None:
    async for status in engine.watch(job_id):
        into.append(status)


async def soon(condition: Callable[[], bool]) -> None:
    """Let other tasks run until the condition holds, failing after half a minute."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the engine under test has nothing to wait on.
            await asyncio.sleep(0.001)
