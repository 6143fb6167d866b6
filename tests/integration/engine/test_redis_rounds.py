"""Rounds over Redis: what is lost, who decides, what is kept. The contract's suite is another."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.redis_server import GROUP, LosingReplies, RedisServer, written
from service.engine.options import EngineOptions
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import State
from tests.support.engines import (
    ALPHA,
    BETA,
    LOOKS,
    SHARD_ROWS,
    assert_exact,
    compute,
    due_jobs,
    finish_everything,
    job_in_rounds,
    status_of,
    votes_at,
)
from tests.support.redis_fleet import Fleet, steady

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.parametrize("appendfsync", ["everysec", "always"])
async def test_kill_of_redis_between_rounds_loses_nothing(
    redis_program: None, tmp_path: Path, appendfsync: str
) -> None:
    """Killed with -9 at each step of each round, Redis comes back with the job at that step."""
    server = RedisServer(tmp_path, appendfsync)
    server.start()
    fleet = Fleet(server.url)
    engine, job = fleet.engine, job_in_rounds("a")

    async def killed() -> None:
        await written(fleet.redis)
        server.kill()
        server.start()

    await engine.pull(ALPHA, 1)
    await engine.submit(job)
    for at, look in enumerate(LOOKS):
        assert at == 0 or await engine.extend("a", look)
        await killed()
        assert await due_jobs(engine) == []
        leases = await engine.pull(ALPHA, 100)
        await compute(engine, leases[1:])
        await killed()
        await compute(engine, leases[:1])
        await killed()
        assert await engine.reconcile() == 0
        (status,) = await engine.due()
        assert status.estimation == votes_at(job, look)
        assert len(status.looks) == at
    assert await engine.finish("a", LOOKS[-1])
    await killed()
    assert_exact(await status_of(engine, "a"))
    assert await fleet.lengths() == []
    await fleet.close()
    server.kill()


@pytest.mark.parametrize("lost", ["stream", "entries", "acknowledged", "group"])
async def test_reconciler_queues_a_later_round_again(fleet: Fleet, lost: str) -> None:
    """Of a later round what no stream would deliver is queued again, and no other round's rows."""
    engine = fleet.engine
    await engine.submit(job_in_rounds("a"))
    for rows in LOOKS[1:]:
        await finish_everything(engine)
        assert await engine.extend("a", rows)
        assert await engine.reconcile() == 0
    leases = await engine.pull(ALPHA, 10)
    (stream,) = await fleet.keys("lane:")
    missing = {"stream": 2, "entries": 2, "acknowledged": 1, "group": 0}[lost]
    match lost:
        case "stream":
            await fleet.redis.delete(stream)
        case "entries":
            await fleet.redis.delete(f"{fleet.prefix}entries:a")
        case "acknowledged":
            assert await fleet.redis.xack(stream, GROUP, leases[0].token.split("/")[0]) == 1
        case "group":
            await fleet.redis.xgroup_destroy(stream, GROUP)
    assert await engine.reconcile() == missing
    assert await engine.reconcile() == 0
    await finish_everything(engine, BETA)
    assert not any(await compute(engine, leases))
    assert await engine.finish("a", LOOKS[-1])
    assert_exact(await status_of(engine, "a"))
    await fleet.lease_runs_out()
    await engine.pull(ALPHA, 1)
    assert await fleet.keys("lane:") == []


async def test_reconciler_finds_due_jobs_again(fleet: Fleet) -> None:
    """Where the list of due jobs is gone, the reconciler makes it again, of due jobs alone."""
    engine = fleet.engine
    for identity in "ab":
        await engine.submit(job_in_rounds(identity))
    await compute(engine, await engine.pull(ALPHA, 25))
    await fleet.redis.delete(f"{fleet.prefix}due", f"{fleet.prefix}backlog")
    assert await due_jobs(engine) == []
    assert await engine.reconcile() == 0
    assert await due_jobs(engine) == ["a"]
    assert (await engine.capacity()).backlog_rows == 25 + 50
    await engine.extend("a", LOOKS[1])
    assert await engine.reconcile() == 0
    assert await due_jobs(engine) == []


async def test_any_process_goes_on_where_another_died(
    redis_server: RedisServer, fleet: Fleet
) -> None:
    """A process that waits for due jobs gets those of others, at once and without a poll."""
    job = job_in_rounds("a")
    await fleet.engine.submit(job)
    another = RedisEngine(
        connect(redis_server.url),
        EngineOptions(shard_rows=100),  # Shards stay as the first process cut them.
        prefix=fleet.prefix,
        poll_seconds=60,
    )
    for look in LOOKS:
        waiting = asyncio.create_task(another.due())
        await steady(another._subscriber)
        await finish_everything(fleet.engine)
        async with asyncio.timeout(30):
            (status,) = await waiting
        assert status.estimation == votes_at(job, look)
        if look < LOOKS[-1]:
            assert await another.extend("a", LOOKS[LOOKS.index(look) + 1])
    assert await another.finish("a", LOOKS[-1])
    status = await status_of(fleet.engine, "a")
    assert_exact(status)
    assert status.looks == (votes_at(job, LOOKS[0]), votes_at(job, LOOKS[1]))
    await another.close()


async def test_decisions_are_safe_to_repeat(redis_server: RedisServer, fleet: Fleet) -> None:
    """Where the reply to `extend` or `finish` is lost, the repeated call says that it was done."""
    for identity in ("warm", "a"):  # Redis has the scripts once they have run.
        await fleet.engine.submit(job_in_rounds(identity))
    await finish_everything(fleet.engine)
    assert await fleet.engine.extend("warm", LOOKS[1])
    assert await fleet.engine.finish("warm", LOOKS[0])
    async with LosingReplies(redis_server.socket) as gap:
        engine = RedisEngine(
            connect(gap.url), EngineOptions(shard_rows=SHARD_ROWS), prefix=fleet.prefix
        )
        gap.marker = engine._scripts._digests["extend"].encode()
        assert await engine.extend("a", LOOKS[1])
        leases = await engine.pull(ALPHA, 100)
        assert sum(lease.shard.rows for lease in leases) == LOOKS[1] - LOOKS[0]
        await compute(engine, leases)
        gap.marker = engine._scripts._digests["finish"].encode()
        assert await engine.finish("a", LOOKS[1])
        assert gap.lost == 2
        status = await status_of(engine, "a")
        assert (status.state, status.rows_done) == (State.SUCCEEDED, 10 + LOOKS[1])
        await engine.close()


@pytest.mark.parametrize("end", ["last", "earlier", "cancel", "delete"])
async def test_rounds_leave_nothing_behind(fleet: Fleet, end: str) -> None:
    """No key of a job in rounds is without a TTL, and its end leaves its hash alone."""
    engine = fleet.engine

    async def timeless() -> list[bytes]:
        return [key for key in await fleet.keys() if await fleet.redis.pttl(key) == -1]

    await engine.submit(job_in_rounds("a"))
    for rows in LOOKS[1:]:
        await compute(engine, (await engine.pull(ALPHA, 100))[1:])
        assert await timeless() == []
        await fleet.lease_runs_out()
        await finish_everything(engine)
        assert await timeless() == []
        assert await fleet.keys("due")
        assert await engine.extend("a", rows)
        assert await fleet.keys("due") == []
        assert await timeless() == []
    match end:
        case "last":
            await finish_everything(engine)
            assert await engine.finish("a", LOOKS[-1])
        case "earlier":
            assert await engine.finish("a", LOOKS[-2])
        case "cancel":
            assert await engine.cancel("a")
        case "delete":
            assert await engine.delete("a")
    for kind in ("lane", "lines", "due", "opened", "entries", "done", "image"):
        assert await fleet.keys(kind) == [], kind
    assert bool(await fleet.keys("job:")) == (end != "delete")
    assert await fleet.redis.hgetall(f"{fleet.prefix}backlog") == {b"all": b"0"}
    assert await timeless() == []


async def test_a_stale_commit_touches_no_other_jobs_message(fleet: Fleet) -> None:
    """A shard of the first round committed again leaves equal entries of later rounds alone."""
    engine = fleet.engine
    await engine.submit(job_in_rounds("a"))
    stale = await engine.pull(ALPHA, 100)
    await compute(engine, stale)
    await engine.extend("a", LOOKS[1])
    (stream,) = await fleet.keys("lane:later:")
    entry = stale[-1].token.split("/")[0]
    ((_, fields),) = await fleet.redis.xrange(stream)
    await fleet.redis.delete(stream)  # As if both streams had got their entries at one moment.
    await fleet.redis.xadd(stream, fields, id=entry)
    await fleet.redis.hset(f"{fleet.prefix}entries:a", fields[b"shard"].decode(), entry)
    await fleet.redis.xgroup_create(stream, GROUP, "0")
    assert await engine.commit(stale[-1], [0, 0, stale[-1].shard.rows]) is False
    assert await engine.reconcile() == 0
    assert len(await engine.pull(BETA, 100)) == 1
