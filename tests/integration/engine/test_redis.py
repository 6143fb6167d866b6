"""service/engine_redis: what only an engine over Redis can suffer. The contract's suite is another.

Time is the server's own here. Where it must pass, leases and TTLs are aged in Redis.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from benchmarks.redis_server import GROUP, LosingReplies, RedisServer, age, written
from service.config import Settings
from service.engine.options import EngineOptions
from service.engine.protocol import FAILURES_ALLOWED, Lease, Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.engine.redis.subscriber import Subscriber
from service.errors import QuotaExceeded
from service.jobs import Domain, JobStatus, Mode, State
from tests.support.fakes import FakeClock, fake_votes, make_job, true_votes
from tests.support.paths import ROOT
from tests.unit.operations.test_tracing import VALID

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHARD_ROWS = 10
LEASE_MS = 30_000
ALPHA = Worker("alpha", {"default": "bundle-a"})
BETA = Worker("beta", {"default": "bundle-a"})


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


@pytest.fixture
async def fleet(redis_server: RedisServer) -> AsyncIterator[Fleet]:
    """A fleet on the session's server, the worker `alpha` alive."""
    built = Fleet(redis_server.url)
    await built.engine.pull(ALPHA, 1)
    yield built
    if keys := await built.keys():
        await built.redis.delete(*keys)
    await built.close()


def votes(lease: Lease) -> list[int]:
    shard = lease.shard
    key = lease.job.domain_key(shard.domain)
    return fake_votes(key, range(shard.start, shard.stop), lease.job.classes)


async def compute(engine: RedisEngine, leases: Sequence[Lease]) -> list[bool]:
    await engine.start(leases)
    return [await engine.commit(lease, votes(lease)) for lease in leases]


async def finish_everything(engine: RedisEngine, worker: Worker = ALPHA) -> None:
    while leases := await engine.pull(worker, 50):
        await compute(engine, leases)


async def status_of(engine: RedisEngine, job_id: str) -> JobStatus:
    status = await engine.status(job_id)
    assert status is not None
    return status


def assert_exact(status: JobStatus) -> None:
    """The job succeeded with every row counted once."""
    assert (status.state, status.rows_done) == (State.SUCCEEDED, status.job.rows)
    assert status.selection == true_votes(status.job, Domain.SELECTION)
    assert status.estimation == true_votes(status.job, Domain.ESTIMATION)


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
    """NOGROUP: a pull makes the group anew, and what was out is delivered once more."""
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


@pytest.fixture
async def rollout(redis_server: RedisServer) -> AsyncIterator[Rollout]:
    """A job under the digest of `alpha`, which is alive."""
    built = Rollout(redis_server.url)
    await built.engine.pull(ALPHA, 1)
    await built.engine.submit(make_job("a", owner="ada"))
    yield built
    await built.fleet.redis.delete(*await built.fleet.keys())
    await built.fleet.close()


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


# Deliveries


async def test_everything_delivered_twice_is_counted_once(fleet: Fleet) -> None:
    """Every message queued a second time changes no count and leaves nothing behind."""
    engine = fleet.engine
    for name in "abc":
        await engine.submit(make_job(name, n=90))
    (stream,) = await fleet.keys("lane:")
    for _, fields in await fleet.redis.xrange(stream):
        await fleet.redis.xadd(stream, fields)
    while leases := await engine.pull(ALPHA, 40):
        await compute(engine, leases)
    for name in "abc":
        assert_exact(await status_of(engine, name))
    assert await fleet.lengths() == []


async def test_stale_commit_is_refused_though_its_ack_succeeds(fleet: Fleet) -> None:
    """After another claimed and committed the shard, its first owner's commit counts nothing."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    stale = await engine.pull(ALPHA, 10)
    await fleet.lease_runs_out()
    current = await engine.pull(BETA, 10)
    (stream,) = await fleet.keys("lane:")
    (pending,) = await fleet.redis.xpending_range(stream, GROUP, "-", "+", 10)
    assert (pending["consumer"], pending["times_delivered"]) == (b"beta", 2)
    assert await fleet.redis.xack(stream, GROUP, stale[0].token.split("/")[0]) == 1
    assert await compute(engine, current) == [True]
    assert await compute(engine, stale) == [False]
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_renewal_leaves_the_count_of_deliveries(fleet: Fleet) -> None:
    """XCLAIM JUSTID makes a lease young again and is no delivery."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 10)
    await age(fleet.redis, fleet.prefix, LEASE_MS // 2)
    assert await engine.renew(leases) == leases
    (stream,) = await fleet.keys("lane:")
    (pending,) = await fleet.redis.xpending_range(stream, GROUP, "-", "+", 10)
    assert pending["times_delivered"] == 1
    assert pending["time_since_delivered"] < LEASE_MS // 2


async def test_processes_share_the_streams(redis_server: RedisServer, fleet: Fleet) -> None:
    """Two processes on the same streams count each shard once, together all of them."""
    engine = fleet.engine
    command = [sys.executable, "-m", "tests.support.redis_worker", redis_server.url, fleet.prefix]
    processes = [
        subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.PIPE)  # noqa: ASYNC220, S603
        for name in ("one", "two")
    ]
    try:
        while await fleet.redis.zcard(f"{fleet.prefix}workers") < 3:
            await engine.pull(ALPHA, 0)  # It too must have been heard of lately.
        made = [make_job(f"job-{number}", n=200) for number in range(20)]
        jobs = await asyncio.gather(*[engine.submit(job) for job in made])
        counted = [int((await asyncio.to_thread(p.communicate))[0]) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert sum(counted) == 20 * 21
    assert all(counted)
    for job in jobs:
        assert_exact(await status_of(engine, job))


async def test_third_failure_leaves_a_letter(fleet: Fleet) -> None:
    """The operator finds which rows ended a job, in which trace, and neither image nor key."""
    engine = fleet.engine
    job = replace(make_job("a"), traceparent=VALID)
    await engine.submit(job)
    for _ in range(FAILURES_ALLOWED):
        (lease,) = await engine.pull(ALPHA, 1)
        await engine.fail(lease, {"detail": "as reported"})
    ((_, letter),) = await fleet.redis.xrange(f"{fleet.prefix}dead")
    assert (letter[b"job"], letter[b"shard"], letter[b"failures"]) == (b"a", b"0", b"3")
    assert b"as reported" in letter[b"problem"]
    assert letter[b"traceparent"] == VALID.encode()
    assert not any(job.pixels in value for value in letter.values())


# Connections


async def test_workers_are_told_of_work_where_none_waited(fleet: Fleet) -> None:
    """Where work waits already nobody who could take it is idle; what comes back is told again."""
    async with fleet.redis.pubsub() as pubsub:
        await pubsub.subscribe(f"{fleet.prefix}arrived")

        async def told() -> int:
            messages = 0
            while found := await pubsub.get_message(timeout=0.2):
                messages += found["type"] == "message"
            return messages

        await told()
        for mode in Mode:
            await fleet.engine.submit(make_job(f"{mode.value}-1", mode=mode, n=20))
            await fleet.engine.submit(make_job(f"{mode.value}-2", mode=mode, n=20))
        assert await told() == 1
        leases = await fleet.engine.pull(ALPHA, 1_000)
        assert await told() == 0
        await fleet.engine.submit(make_job("next", n=20))
        assert await told() == 1
        await fleet.engine.release(leases)
        assert await told() == 1


async def test_lost_connections_are_made_again(fleet: Fleet) -> None:
    """Connections that Redis closes, in use or not, cost no call and no watcher anything."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    async with aclosing(engine.watch("a")) as watching:
        assert (await anext(watching)).rows_done == 0
        for done in (10, 20, 30):
            await fleet.redis.client_kill_filter(_type="normal", skipme=True)
            await fleet.redis.client_kill_filter(_type="pubsub")
            await compute(engine, await engine.pull(ALPHA, 10))
            async with asyncio.timeout(5):
                assert (await anext(watching)).rows_done == done


async def test_lost_replies_change_nothing(redis_server: RedisServer, fleet: Fleet) -> None:
    """A call that was executed and never answered is made again, and has the effect of one."""
    problem = {"detail": "no"}
    await fleet.engine.submit(make_job("warm"))  # From here on Redis knows every script.
    (lease, other) = await fleet.engine.pull(ALPHA, 20)
    await compute(fleet.engine, [lease])
    await fleet.engine.fail(other, problem)
    await fleet.engine.cancel("warm")

    async with LosingReplies(redis_server.socket) as gap:
        engine = RedisEngine(
            connect(gap.url), EngineOptions(shard_rows=SHARD_ROWS), prefix=fleet.prefix
        )
        await engine.pull(ALPHA, 1)
        gap.marker = b'"id":"a"'
        assert await engine.submit(make_job("a", owner="ada")) == "a"
        gap.marker = b"alpha"
        leases = await engine.pull(ALPHA, 30)
        assert [lease.shard.index for lease in leases] == [0, 1, 2]
        (stream,) = await fleet.keys("lane:")
        assert (await fleet.redis.xpending(stream, GROUP))["pending"] == 3
        gap.marker = leases[0].token.encode()
        assert await engine.start(leases) == leases
        gap.marker = leases[0].token.encode()
        await engine.commit(leases[0], votes(leases[0]))
        gap.marker = leases[1].token.encode()
        await engine.fail(leases[1], problem)
        assert await fleet.redis.hget(f"{fleet.prefix}job:a", "f:1") == b"1"
        gap.marker = leases[2].token.encode()
        await engine.release(leases[2:])
        assert (await engine.capacity("ada")).owner_rows == 30
        await finish_everything(engine, BETA)
        assert_exact(await status_of(engine, "a"))
        await engine.submit(make_job("b"))
        gap.marker = b"cancelled"
        await engine.cancel("b")
        assert (await status_of(engine, "b")).state is State.CANCELLED
        assert gap.lost == 7
        await engine.close()


async def test_listener_begins_again(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that ended by an error nobody thought of hears again once it is asked."""
    redis, channel = connect(redis_server.url), f"{{{secrets.token_hex(8)}}}:channel"
    listener, hear = Subscriber(redis, channel), Subscriber._hear
    failed = asyncio.Event()

    async def fail(*arguments: object) -> None:
        failed.set()
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(Subscriber, "_hear", fail)
    ring = listener.always.next
    await failed.wait()
    monkeypatch.setattr(Subscriber, "_hear", hear)
    async with asyncio.timeout(30):
        while not ring.is_set():
            ring = listener.always.next
            await asyncio.wait({asyncio.ensure_future(ring.wait())}, timeout=0.05)
    await listener.close()
    await redis.aclose()


async def steady(listener: Subscriber, wanted: bool = True) -> None:
    """Returns once the listener says so."""
    async with asyncio.timeout(60):
        while listener.steady is not wanted:  # noqa: ASYNC110 - it has nothing to wait on.
            await asyncio.sleep(0.01)


async def test_watch_of_a_quiet_job_asks_seldom(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who hears of every change need not ask for it, however short the poll is."""
    engine, ask = fleet.engine, fleet.engine.status
    await engine.submit(make_job("a"))
    asked: list[str] = []

    async def counted(job_id: str) -> JobStatus | None:
        asked.append(job_id)
        return await ask(job_id)

    async def last() -> JobStatus:
        return [status async for status in engine.watch("a")][-1]

    watching = asyncio.create_task(last())
    await steady(engine._subscriber)
    monkeypatch.setattr(engine, "status", counted)
    for _ in range(40):
        assert await engine.pull(NEWER, 1) == []  # Takes as long as a poll.
    assert len(asked) < 20
    await finish_everything(engine)
    async with asyncio.timeout(30):
        assert_exact(await watching)


async def test_many_watchers_need_few_connections(redis_server: RedisServer, fleet: Fleet) -> None:
    """Ten times as many watchers as connections all see the end, though none hears of it."""
    watchers = RedisEngine(
        connect(redis_server.url),
        EngineOptions(shard_rows=SHARD_ROWS),
        prefix=fleet.prefix,
        poll_seconds=0.05,
    )
    jobs = [f"job-{number}" for number in range(640)]
    for job in jobs:
        await fleet.engine.submit(make_job(job))

    async def last(job: str) -> JobStatus:
        return [status async for status in watchers.watch(job)][-1]

    watching = asyncio.gather(*map(last, jobs))
    await steady(watchers._subscriber)
    for job in jobs:
        await fleet.engine.cancel(job)
    async with asyncio.timeout(60):
        assert {status.state for status in await watching} == {State.CANCELLED}
    await watchers.close()


async def test_a_killed_server_is_not_heard(own_server: RedisServer) -> None:
    """A subscription that is cut is not steady, and is once it is made again, which rings."""
    redis = connect(own_server.url)
    listener = Subscriber(redis, "{prefix}:channel")
    assert not listener.steady
    ring = listener.always.next
    await steady(listener)
    assert ring.is_set()
    own_server.kill()
    await steady(listener, False)
    ring = listener.always.next
    own_server.start()
    await steady(listener)
    async with asyncio.timeout(30):
        await ring.wait()
    await listener.close()
    assert not listener.steady
    await redis.aclose()


async def test_a_dead_connection_is_noticed(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says nothing, and cuts nothing, is not heard; one that answers a PING is."""
    monkeypatch.setattr("service.engine.redis.subscriber._SILENCE_SECONDS", 0.5)
    redis = connect(own_server.url)
    listener = Subscriber(redis, "{prefix}:channel")
    ring = listener.always.next
    await steady(listener)
    ring = listener.always.next
    while not (await redis.info("commandstats")).get("cmdstat_ping"):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert listener.steady
    assert not ring.is_set()
    own_server.pause()
    await steady(listener, False)
    own_server.resume()
    await steady(listener)
    async with asyncio.timeout(30):
        await ring.wait()
    await listener.close()
    await redis.aclose()


async def test_watch_outlives_a_restart(own_server: RedisServer) -> None:
    """Who watches while Redis is killed and started again sees the end of the job."""
    fleet = Fleet(own_server.url)
    engine = fleet.engine
    await engine.pull(ALPHA, 1)
    await engine.submit(make_job("a"))
    seen: list[JobStatus] = []

    async def watch() -> None:
        async for status in engine.watch("a"):
            seen.append(status)

    watching = asyncio.create_task(watch())
    while not seen:  # noqa: ASYNC110 - the engine has nothing to wait on.
        await asyncio.sleep(0.01)
    await written(fleet.redis)
    own_server.kill()
    await asyncio.sleep(0.2)
    own_server.start()
    await finish_everything(engine)
    async with asyncio.timeout(10):
        await watching
    assert_exact(seen[-1])
    await fleet.close()


async def test_a_cancelled_call_ends(own_server: RedisServer) -> None:
    """At whatever moment a task is cancelled that talks to Redis, it is cancelled."""
    fleet = Fleet(own_server.url)
    enough = asyncio.Event()

    async def ask_on() -> None:
        while not enough.is_set():
            await fleet.engine.status("unknown")

    for moment in range(100):
        asking = asyncio.create_task(ask_on())
        for _ in range(moment):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking}, timeout=5)
        enough.set()  # Whoever goes on must not outlive the test.
        await asyncio.wait({asking})
        enough.clear()
        assert asking.cancelled(), f"not after {moment} steps of the loop"
    await fleet.close()


async def test_loading_server_is_waited_for(own_server: RedisServer) -> None:
    """LOADING: a call to a server that still reads its file succeeds once that is read."""
    fleet = Fleet(own_server.url)
    await fleet.engine.pull(ALPHA, 1)
    for number in range(300):  # The server answers once in 1,024 commands that it reads.
        await fleet.engine.submit(make_job(f"job-{number}"))
    await written(fleet.redis)
    own_server.kill()
    own_server.launch(key_load_delay=300)
    impatient: Redis = Redis.from_url(own_server.url, retry=None)
    while "LOADING" not in (heard := await answer(impatient)):
        assert heard != "PONG", "the server was never seen to load"
        await asyncio.sleep(0.01)
    assert (await fleet.engine.capacity()).backlog_rows == 12_000
    await impatient.aclose()
    await fleet.close()


async def answer(client: Redis) -> str:
    """What a server says to a PING, be it an error."""
    try:
        return "PONG" if await client.ping() else ""
    except Exception as error:
        return type(error).__name__ + str(error).upper()


async def test_replica_is_left_for_the_master(own_server: RedisServer) -> None:
    """READONLY: a call to a server that has become a replica succeeds once there is a master."""
    fleet = Fleet(own_server.url)
    await fleet.engine.pull(ALPHA, 1)
    await fleet.redis.replicaof("127.0.0.1", "1")
    submitting = asyncio.create_task(fleet.engine.submit(make_job("a")))
    await asyncio.sleep(0.3)
    assert not submitting.done()
    await fleet.redis.replicaof("NO", "ONE")
    assert await submitting == "a"
    await fleet.close()


async def test_unreachable_redis_is_an_error(redis_program: None, tmp_path: Path) -> None:
    """Where there is no server a call fails after some tries instead of waiting for ever."""
    fleet = Fleet(RedisServer(tmp_path).url)
    async with asyncio.timeout(30):
        with pytest.raises(RedisError):
            await fleet.engine.capacity()
    await fleet.close()


async def test_settings_bound_a_keys_rows(own_server: RedisServer) -> None:
    """VOUCHSAFE_MAX_QUEUE_ROWS_PER_KEY is the quota of every key, and of nobody without one."""
    engine = RedisEngine.from_settings(
        Settings(redis_url=own_server.url, max_queue_rows_per_key=50)
    )
    await engine.pull(ALPHA, 1)
    await engine.submit(make_job("a", owner="ada"))
    with pytest.raises(QuotaExceeded):
        await engine.submit(make_job("b", owner="ada"))
    await engine.submit(make_job("c", n=50))
    await engine.close()


async def test_least_rights_are_enough(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ACL user that sees only Vouchsafe's keys and channels, named in the URL, can do it all."""
    admin: Redis = Redis.from_url(own_server.url)
    rights = "-@all +@read +@write +@pubsub +@scripting +@connection +@transaction +time"
    await admin.execute_command(
        "ACL", "SETUSER", "fleet", "on", ">s3cret", f"~{PREFIX}*", f"&{PREFIX}*", *rights.split()
    )
    url = own_server.url_for("fleet:s3cret")
    engine = RedisEngine.from_settings(Settings(redis_url=url, shard_rows=SHARD_ROWS))
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    worker = asyncio.create_task(engine.pull(ALPHA, 100))
    await asyncio.sleep(0.1)
    await engine.submit(make_job("a"))
    await compute(engine, await worker)
    assert_exact([status async for status in engine.watch("a")][-1])
    assert await engine.delete("a")
    queue = await engine.stats()
    assert (queue.workers, queue.persists) == (1, None)  # It has no right to INFO.
    await engine.close()
    await admin.aclose()


async def test_trouble_with_the_disk_is_told(own_server: RedisServer, tmp_path: Path) -> None:
    """What Redis could not write shows in the queue's state until it has written it."""
    in_the_way = tmp_path / "redis" / "dump.rdb"
    async with Redis.from_url(own_server.url) as redis:

        async def saved() -> None:
            await redis.bgsave()
            async with asyncio.timeout(60):
                while (await redis.info("persistence"))["rdb_bgsave_in_progress"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        engine = RedisEngine(connect(own_server.url), EngineOptions(shard_rows=SHARD_ROWS))
        assert (await engine.stats()).persists is True
        in_the_way.mkdir()
        await saved()
        assert (await engine.stats()).persists is False
        in_the_way.rmdir()
        await saved()
        assert (await engine.stats()).persists is True
        await engine.close()


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
