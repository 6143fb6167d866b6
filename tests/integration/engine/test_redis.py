"""service/engine/redis: what only an engine over Redis can suffer. The contract's suite is another.

Time is the server's own here. Where it must pass, leases and TTLs are aged in Redis.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.redis_server import GROUP, RedisServer, written
from service.engine.options import EngineOptions
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import Mode, State
from tests.support.engines import (
    ALPHA,
    BETA,
    SHARD_ROWS,
    assert_exact,
    compute,
    finish_everything,
    status_of,
)
from tests.support.fakes import make_job
from tests.support.http import VALID
from tests.support.redis_fleet import NEWER, Fleet, Rollout

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


# What Redis loses


@pytest.mark.parametrize("appendfsync", ["everysec", "always"])
async def test_kill_of_redis_loses_nothing(
    redis_program: None, tmp_path: Path, appendfsync: str
) -> None:
    """Killed with -9 again and again in the middle of work, Redis comes back with every shard."""
    server = RedisServer(tmp_path, appendfsync)
    server.start()
    fleet = Fleet(server.url)
    engine = fleet.engine
    await engine.pull(ALPHA, 1)
    jobs = [await engine.submit(make_job(f"job-{number}", n=1_000)) for number in range(12)]
    await written(fleet.redis)
    working = asyncio.create_task(finish_everything(engine))
    for _ in range(4):
        await asyncio.sleep(0.1)
        assert not working.done()
        server.kill()
        server.start()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await engine.pull(ALPHA, 100)  # Leased, and never heard of again.
    server.kill()
    server.start()
    await engine.reconcile()
    await fleet.lease_runs_out()
    await finish_everything(engine)
    for job in jobs:
        assert_exact(await status_of(engine, job))
    assert await fleet.lengths() == []
    await fleet.close()
    server.kill()


@pytest.mark.parametrize("lost", ["stream", "entries", "acknowledged", "group"])
async def test_reconciler_queues_again_what_is_missing(fleet: Fleet, lost: str) -> None:
    """Shards that no stream would deliver any more are queued again, and none that one would."""
    engine = fleet.engine
    await engine.submit(make_job("a", n=90))
    await compute(engine, await engine.pull(ALPHA, 30))
    leases = await engine.pull(ALPHA, 20)
    assert await engine.reconcile() == 0
    (stream,) = await fleet.keys("lane:")
    missing = {"stream": 7, "entries": 7, "acknowledged": 2, "group": 0}[lost]
    match lost:
        case "stream":
            await fleet.redis.delete(stream)
        case "entries":
            await fleet.redis.delete(f"{fleet.prefix}entries:a")
        case "acknowledged":
            for lease in leases:
                entry = lease.token.split("/")[0]
                assert await fleet.redis.xack(stream, GROUP, entry) == 1
        case "group":
            await fleet.redis.xgroup_destroy(stream, GROUP)
    assert await engine.reconcile() == missing
    assert await engine.reconcile() == 0
    await finish_everything(engine, BETA)
    assert not any(await compute(engine, leases))
    assert_exact(await status_of(engine, "a"))
    await fleet.lease_runs_out()
    await engine.pull(ALPHA, 1)
    assert await fleet.keys("lane:") == []


async def test_messages_carry_the_trace(fleet: Fleet) -> None:
    """Each message and each lease names its job's trace, in messages made again too."""
    engine = fleet.engine
    await engine.submit(replace(make_job("a"), traceparent=VALID))
    await engine.submit(make_job("b"))
    for _ in range(2):
        (stream,) = await fleet.keys("lane:lo:")
        messages = [fields for _, fields in await fleet.redis.xrange(stream)]
        assert {(told[b"job"], told[b"traceparent"]) for told in messages} == {
            (b"a", VALID.encode()),
            (b"b", b""),
        }
        await fleet.redis.delete(stream)
        await engine.reconcile()
    leases = await engine.pull(ALPHA, 80)
    assert {lease.job.id: lease.job.traceparent for lease in leases} == {"a": VALID, "b": None}


async def test_reconciler_books_open_work_again(fleet: Fleet) -> None:
    """Where the books of open work are gone, what is left of open jobs is booked again, once."""
    engine = fleet.engine
    await engine.submit(make_job("a", owner="ada"))
    await engine.submit(make_job("b"))
    leases = await engine.pull(ALPHA, 30)
    await compute(engine, leases[:1])
    await fleet.redis.delete(f"{fleet.prefix}backlog")
    await compute(engine, leases[1:])
    for _ in range(2):
        await engine.reconcile()
        capacity = await engine.capacity("ada")
        assert (capacity.owner_rows, capacity.backlog_rows) == (10, 50)
    await finish_everything(engine)
    assert await fleet.redis.hgetall(f"{fleet.prefix}backlog") == {b"all": b"0"}


async def test_reconciler_books_lanes_again(fleet: Fleet) -> None:
    """Where the books got lost, rows are counted in the lane of their job again."""
    engine = fleet.engine
    await engine.submit(make_job("fast", mode=Mode.PREDICT))
    await engine.submit(make_job("slow"))
    await fleet.redis.delete(f"{fleet.prefix}backlog")
    await engine.reconcile()
    lanes = (await engine.stats()).priorities
    assert (lanes["hi"].rows, lanes["lo"].rows) == (30, 40)


async def test_books_begin_anew_where_nothing_is_open(fleet: Fleet) -> None:
    """What another release left in the books of a lane goes with the first job of an idle queue."""
    engine = fleet.engine
    await fleet.redis.hset(f"{fleet.prefix}backlog", mapping={"all": 0, "hi": 32, "hi:gone": ""})
    await engine.submit(make_job("slow"))
    lanes = (await engine.stats()).priorities
    assert (lanes["hi"].rows, lanes["lo"].rows) == (0, 40)


async def test_pull_reconciles_by_itself(redis_server: RedisServer, fleet: Fleet) -> None:
    """Nobody has to ask: once a lease's time a pull looks for what is missing."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    await fleet.redis.delete(*await fleet.keys("lane:"))
    assert await engine.pull(ALPHA, 100) == []
    await fleet.lease_runs_out()
    another = RedisEngine(
        connect(redis_server.url),
        EngineOptions(shard_rows=SHARD_ROWS),
        prefix=fleet.prefix,
        poll_seconds=10,
    )
    assert len(await another.pull(ALPHA, 100)) == 4
    await another.close()


async def test_reconciling_holds_up_no_pull(
    redis_server: RedisServer, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes to look through many jobs, the worker that does so has work."""
    another = RedisEngine(
        connect(redis_server.url), EngineOptions(shard_rows=SHARD_ROWS), prefix=fleet.prefix
    )
    monkeypatch.setattr(another, "reconcile", asyncio.Event().wait)
    await fleet.redis.delete(f"{fleet.prefix}reconciled")
    await fleet.engine.submit(make_job("a"))
    async with asyncio.timeout(30):
        assert len(await another.pull(BETA, 20)) == 2
    await another.close()


async def test_entry_deleted_by_hand_blocks_nothing(fleet: Fleet) -> None:
    """What was handed back and is gone from the stream does not hide what comes after it."""
    engine = fleet.engine
    await engine.submit(make_job("a", n0=0))
    first = await engine.pull(ALPHA, 10)
    await engine.release(first)
    (stream,) = await fleet.keys("lane:")
    await fleet.redis.xdel(stream, first[0].token.split("/")[0])
    assert [lease.shard.index for lease in await engine.pull(BETA, 100)] == [1, 2]
    assert await engine.reconcile() == 1
    assert [lease.shard.index for lease in await engine.pull(BETA, 100)] == [0]


async def test_lost_group_is_made_again(fleet: Fleet) -> None:
    """NOGROUP: a pull creates the group again, and leased shards are delivered once more."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    out = await engine.pull(ALPHA, 20)
    (stream,) = await fleet.keys("lane:")
    await fleet.redis.xgroup_destroy(stream, GROUP)
    assert await engine.renew(out) == []
    assert len(await engine.pull(BETA, 100)) == 4
    assert all(await compute(engine, out))


async def test_flushed_redis_is_an_empty_one(own_server: RedisServer) -> None:
    """After FLUSHALL old jobs are unknown, old leases are nothing, and new jobs are answered."""
    fleet = Fleet(own_server.url)
    engine = fleet.engine
    await engine.pull(ALPHA, 1)
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 20)
    await fleet.redis.flushall()
    assert await engine.status("a") is None
    assert await engine.renew(leases) == []
    assert not any(await compute(engine, leases))
    await engine.release(leases)
    await engine.pull(ALPHA, 1)
    await engine.submit(make_job("b"))
    await finish_everything(engine)
    assert_exact(await status_of(engine, "b"))
    await fleet.close()


async def test_lost_tally_fails_the_job(fleet: Fleet) -> None:
    """Where the record of counted shards is gone, the job ends rather than count rows twice."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 100)
    await compute(engine, leases[:2])
    await fleet.redis.delete(f"{fleet.prefix}done:a")
    assert await compute(engine, leases[:1]) == [False]
    status = await status_of(engine, "a")
    assert (status.state, status.rows_done) == (State.FAILED, 20)
    assert status.problem is not None
    assert "lost" in status.problem["detail"]


async def test_lost_image_fails_the_job(fleet: Fleet) -> None:
    """A job without its image ends with a problem; it is not handed out for ever."""
    await fleet.engine.submit(make_job("a"))
    await fleet.redis.delete(f"{fleet.prefix}image:a")
    assert await fleet.engine.pull(ALPHA, 100) == []
    assert await fleet.redis.hget(f"{fleet.prefix}job:a", "state") == b"failed"
    assert (await fleet.engine.capacity()).backlog_rows == 0


# What nobody serves


async def test_jobs_that_nobody_serves_any_more_fail(rollout: Rollout) -> None:
    """After a rollout the jobs of the old digest end with a problem and leave the backlog."""
    engine = rollout.engine
    assert await rollout.look(ALPHA, NEWER, seconds=600) is State.QUEUED
    await engine.submit(make_job("new", bundle="bundle-b"))
    assert await rollout.look(NEWER, seconds=300) is State.QUEUED
    assert await rollout.look(NEWER, seconds=100) is State.FAILED
    status = await status_of(engine, "a")
    assert status.problem is not None
    assert status.problem["job"] == "a"
    assert "ask again" in status.problem["detail"]
    capacity = await engine.capacity("ada")
    assert (capacity.backlog_rows, capacity.owner_rows) == (40, 0)
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "new"))
    assert await rollout.fleet.lengths() == []


async def test_a_line_that_comes_back_is_kept(rollout: Rollout) -> None:
    """However often the old digest is away for less than the limit, its jobs are computed."""
    for _ in range(3):
        assert await rollout.look(NEWER, seconds=250) is State.QUEUED
        await rollout.engine.pull(ALPHA, 0)
    await rollout.look(NEWER, seconds=250)
    await finish_everything(rollout.engine)
    assert_exact(await status_of(rollout.engine, "a"))


async def test_nothing_ends_where_no_worker_lives(rollout: Rollout) -> None:
    """While all workers are away jobs wait, and that time is not held against any digest."""
    await rollout.look(NEWER, seconds=200)
    assert await rollout.look(seconds=1_000) is State.QUEUED
    assert await rollout.look(NEWER, seconds=200) is State.QUEUED
    await finish_everything(rollout.engine)
    assert_exact(await status_of(rollout.engine, "a"))


async def test_a_job_served_again_is_not_ended(rollout: Rollout) -> None:
    """A worker that comes while jobs are being ended saves those that are left."""
    engine, look = rollout.engine, rollout.engine._scripts.run
    await rollout.look(NEWER, seconds=300)
    rollout.clock.advance(100)

    async def interrupted(name: str, *arguments: Any) -> Any:
        if name == "abandon":
            await engine.pull(ALPHA, 0)
        return await look(name, *arguments)

    await engine.pull(NEWER, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._scripts, "run", interrupted)
        await engine.reconcile()
    assert (await status_of(engine, "a")).state is State.QUEUED
