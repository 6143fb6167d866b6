"""The engine over Redis: connections that fail, and processes that share the streams."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from benchmarks.redis_server import GROUP, LosingReplies, RedisServer, age, written
from service.config import Settings
from service.engine.options import EngineOptions
from service.engine.protocol import FAILURES_ALLOWED
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.engine.redis.subscriber import Subscriber
from service.errors import QuotaExceeded
from service.jobs import JobStatus, Mode, State
from tests.support.engines import (
    ALPHA,
    BETA,
    LOOKS,
    SHARD_ROWS,
    assert_exact,
    compute,
    finish_everything,
    job_in_rounds,
    status_of,
    votes,
)
from tests.support.fakes import make_job
from tests.support.http import VALID
from tests.support.paths import ROOT
from tests.support.redis_fleet import LEASE_MS, NEWER, Fleet, answer, steady

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
    """Workers are notified only where no work waited; released shards notify them again."""
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
        enough.set()  # The workers must not outlive the test.
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
    await engine.submit(job_in_rounds("b"))
    due = asyncio.create_task(engine.due())
    await compute(engine, await engine.pull(ALPHA, 100))
    assert [status.job.id for status in await due] == ["b"]
    assert await engine.extend("b", LOOKS[1])
    assert await engine.finish("b", LOOKS[0])
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
