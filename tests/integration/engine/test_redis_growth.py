"""The engine over Redis: what it keeps, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.redis_server import GROUP, RedisServer, age, written
from service.config import Settings
from service.engine.protocol import FAILURES_ALLOWED
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import State
from tests.support.engines import ALPHA, BETA, compute, finish_everything, status_of
from tests.support.fakes import FakeClock, make_job
from tests.support.redis_fleet import Fleet

# Growth


async def test_every_key_expires(fleet: Fleet) -> None:
    """At any stage of any job, no key is without a TTL."""
    engine = fleet.engine

    async def timeless() -> list[bytes]:
        return [key for key in await fleet.keys() if await fleet.redis.pttl(key) == -1]

    for name in ("done", "failed", "cancelled", "running", "queued"):
        await engine.submit(make_job(name), idempotency_key=name)
    assert await timeless() == []
    await engine.cancel("cancelled")
    leases = await engine.pull(ALPHA, 120)
    await compute(engine, [lease for lease in leases if lease.job.id == "done"])
    await compute(engine, [lease for lease in leases if lease.job.id == "running"][:2])
    assert await timeless() == []
    failing = [lease for lease in leases if lease.job.id == "failed"][:1]
    for _ in range(FAILURES_ALLOWED):
        await engine.fail(failing[0], {"detail": "no"})
        failing = [held for held in await engine.pull(BETA, 10) if held.job.id == "failed"]
    await fleet.redis.delete(*await fleet.keys("lane:"))
    await engine.reconcile()
    await engine.capacity()
    assert (await status_of(engine, "failed")).state is State.FAILED
    assert await fleet.keys("dead")
    assert await timeless() == []


@pytest.mark.parametrize("weighs", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_nothing_grows(own_server: RedisServer, weighs: bool) -> None:
    """After a load the streams are gone at once, and keys and memory once the retention is over.

    With leases this long only the first pull reconciles, and whose keys last as long stay.
    """
    fleet = Fleet(own_server.url, retention_seconds=600, lease_seconds=36_000)
    engine = fleet.engine
    connections: list[int] = []

    async def memory() -> int:
        """Once Redis has taken back its buffers for idle connections, of 1 to 40 KB each."""
        async with connect(own_server.url) as looking:
            await written(looking)
            itself = await looking.client_id()

            def is_idle(client: dict[str, str]) -> bool:
                if int(client["id"]) == itself:
                    return int(client["rbs"]) <= 8192  # Of 16 KB; the list of clients is in it.
                return int(client["rbs"]) <= 2048 and int(client["qbuf-free"]) <= 4096

            async def all_idle() -> bool:
                return all(is_idle(client) for client in await looking.client_list())

            async with asyncio.timeout(60):
                while True:
                    await looking.slowlog_reset()
                    await looking.memory_purge()
                    before = await all_idle()
                    used = int((await looking.info("memory"))["used_memory"])
                    if before and await all_idle():
                        connections.append(len(await looking.client_list()))
                        return used
                    await asyncio.sleep(0.1)

    async def lasting() -> set[bytes]:
        """All keys but the sweep's turn: it lives for a millisecond, and Redis counts it longer."""
        return set(await fleet.redis.keys()) - {f"{fleet.prefix}swept".encode()}

    async def load(name: str) -> None:
        for number in range(100):
            job = make_job(f"{name}-{number}", n=200)
            await engine.submit(job, idempotency_key=job.id)
        for number in range(20):
            await engine.cancel(f"{name}-{number}")
            await engine.delete(f"{name}-{number + 20}")
        await finish_everything(engine)
        assert await fleet.lengths() == []
        assert await fleet.keys("lines") == []
        await age(fleet.redis, fleet.prefix, 700_000)
        await engine.pull(ALPHA, 1)

    await engine.pull(ALPHA, 1)
    await load("warm")
    keys, idle = await lasting(), await memory() if weighs else 0
    for number in range(3):
        await load(f"load-{number}")
        assert await lasting() == keys
    if weighs:
        assert await memory() <= idle + 20_000
        assert connections[-1] <= connections[0] + 1  # Each load is one more, where it leaks.
    await fleet.close()


async def test_most_ended_jobs_are_kept(redis_server: RedisServer) -> None:
    """Of the ended jobs the last `max_finished_jobs` are kept: they cannot fill the memory."""
    fleet = Fleet(redis_server.url, max_finished_jobs=3)
    await fleet.engine.pull(ALPHA, 1)
    for number in range(5):
        await fleet.engine.submit(make_job(f"job-{number}"))
        await finish_everything(fleet.engine)
    assert sorted(await fleet.keys("job:")) == [
        f"{fleet.prefix}job:job-{number}".encode() for number in (2, 3, 4)
    ]
    await fleet.close()


async def test_fewer_kept_jobs_are_reached_some_at_a_time(redis_server: RedisServer) -> None:
    """After `max_finished_jobs` was lowered, no end of a job erases a great many others."""
    fleet = Fleet(redis_server.url, max_finished_jobs=1)
    await fleet.engine.pull(ALPHA, 1)
    many = {f"old-{number}": 4e9 + number for number in range(150)}
    await fleet.redis.zadd(f"{fleet.prefix}ended", many)
    left = []
    for number in range(2):
        await fleet.engine.submit(make_job(f"job-{number}"))
        await fleet.engine.cancel(f"job-{number}")
        left.append(await fleet.redis.zcard(f"{fleet.prefix}ended"))
    assert left == [51, 1]
    await fleet.redis.delete(*await fleet.keys())
    await fleet.close()


async def test_settings_bound_the_kept_jobs(own_server: RedisServer) -> None:
    """VOUCHSAFE_MAX_FINISHED_JOBS is how many ended jobs stay, Idempotency-Keys and all."""
    engine = RedisEngine.from_settings(Settings(redis_url=own_server.url, max_finished_jobs=1))
    await engine.pull(ALPHA, 1)
    for name in "ab":
        await engine.submit(make_job(name), idempotency_key=name)
        await engine.cancel(name)
    assert await engine.status("a") is None
    assert await engine.submit(make_job("c"), idempotency_key="b") == "b"
    await engine.close()


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
async def test_image_goes_as_its_job_ends(fleet: Fleet, end: str) -> None:
    """An ended job is answered without its image, which is the caller's and most of the memory."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    await engine.pull(BETA, 0)
    assert await fleet.keys("image:")
    match end:
        case "succeeded":
            await finish_everything(engine)
        case "failed":
            for _ in range(FAILURES_ALLOWED):
                (lease,) = await engine.pull(ALPHA, 1)
                await engine.fail(lease, {"detail": "no"})
        case "cancelled":
            await engine.cancel("a")
    assert await fleet.keys("image:") == []
    assert (await status_of(engine, "a")).state == end
    assert [status.state async for status in engine.watch("a")] == [end]


async def test_many_leases_run_out_some_at_a_time(redis_server: RedisServer) -> None:
    """A whole fleet's leases do not keep Redis from everyone; each call takes some of them back."""
    fleet = Fleet(redis_server.url, sweep_seconds=1_000)
    await fleet.engine.pull(ALPHA, 1)
    await fleet.engine.submit(make_job("a", n0=0, n=12_000))
    assert len(await fleet.engine.pull(ALPHA, 12_000)) == 1_200
    await fleet.lease_runs_out()
    (stream,) = await fleet.keys("lane:")

    async def still_leased() -> int:
        found = await fleet.redis.xpending(stream, GROUP)
        return sum(c["pending"] for c in found["consumers"] if c["name"] == b"alpha")

    await fleet.redis.delete(f"{fleet.prefix}swept")
    left = [1_200]
    while left[-1]:
        await fleet.engine.status("a")
        left.append(await still_leased())
        assert left[-2] > left[-1] > left[-2] - 1_000
    assert len(await fleet.engine.pull(BETA, 12_000)) == 1_200
    await fleet.redis.delete(*await fleet.keys())
    await fleet.close()


async def test_fleet_that_was_silent_leaves_the_group(redis_server: RedisServer) -> None:
    """Workers that all fell silent together are no consumers any more once somebody looks."""
    clock = FakeClock()
    fleet = Fleet(redis_server.url, clock=clock)
    await fleet.engine.pull(BETA, 1)
    await fleet.engine.submit(make_job("a", n=90))
    await compute(fleet.engine, await fleet.engine.pull(BETA, 10))
    (stream,) = await fleet.keys("lane:")
    assert len(await fleet.redis.xinfo_consumers(stream, GROUP)) == 1
    clock.advance(31)
    await age(fleet.redis, fleet.prefix, 31_000)
    assert (await fleet.engine.capacity()).digests == {}
    assert await fleet.redis.xinfo_consumers(stream, GROUP) == []
    await fleet.redis.delete(*await fleet.keys())
    await fleet.close()


async def test_gone_workers_leave_the_group(fleet: Fleet) -> None:
    """A worker that is silent for long is no consumer any more, also while the stream lives on."""
    engine = fleet.engine
    await engine.submit(make_job("a", n=90))
    leases = await engine.pull(BETA, 10)
    await compute(engine, leases)
    (stream,) = await fleet.keys("lane:")
    assert len(await fleet.redis.xinfo_consumers(stream, GROUP)) == 1
    await fleet.redis.zadd(f"{fleet.prefix}workers", {"beta": 1})
    await age(fleet.redis, fleet.prefix, 10)
    await engine.capacity()
    assert await fleet.redis.xinfo_consumers(stream, GROUP) == []
