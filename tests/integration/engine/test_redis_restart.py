"""A job that begins anew, as only an engine over Redis can suffer it: streams, crashes, replies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.redis_server import GROUP, LosingReplies, RedisServer, age, written
from service.engine.protocol import FAILURES_ALLOWED, Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import State
from tests.integration.engine.test_redis import (
    ALPHA,
    BETA,
    LEASE_MS,
    SHARD_ROWS,
    Fleet,
    Rollout,
    assert_exact,
    compute,
    finish_everything,
    status_of,
    votes,
)
from tests.support.fakes import make_job
from tests.unit.operations.test_tracing import VALID

pytestmark = [  # A connection that is cut while the client makes it is left to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NEW = "bundle-n"
KEY = b"new key".ljust(32, b"n")
NEWER = Worker("newer", {"default": NEW})
OLD_LINE, NEW_LINE = "lane:lo:default@bundle-a", f"lane:lo:default@{NEW}"


@pytest.fixture
async def fleet(redis_server: RedisServer) -> AsyncIterator[Fleet]:
    """A fleet on the session's server, the workers `alpha` and `newer` alive."""
    built = Fleet(redis_server.url)
    await built.engine.pull(ALPHA, 1)
    await built.engine.pull(NEWER, 1)
    yield built
    if keys := await built.keys():
        await built.redis.delete(*keys)
    await built.close()


async def messages(fleet: Fleet, line: str) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in await fleet.redis.xrange(fleet.prefix + line)]


# Streams


async def test_messages_say_what_is_so_now(fleet: Fleet) -> None:
    """The new line's messages are the old one's but for the digest; the old line is gone."""
    engine = fleet.engine
    await engine.submit(replace(make_job("a"), traceparent=VALID))
    old = await messages(fleet, OLD_LINE)
    await engine.pull(ALPHA, 20)
    assert await engine.restart("a", NEW, KEY)
    assert await messages(fleet, NEW_LINE) == [told | {b"bundle": NEW.encode()} for told in old]
    assert await fleet.keys("lane:") == [(fleet.prefix + NEW_LINE).encode()]
    assert await fleet.redis.hkeys(f"{fleet.prefix}lines") == [f"default@{NEW}".encode()]


async def test_the_reconciler_finds_nothing_missing(fleet: Fleet) -> None:
    """Whatever was delivered or counted of the old line, each shard is in the new one once."""
    engine = fleet.engine
    await engine.submit(make_job("a", n=90))
    await compute(engine, await engine.pull(ALPHA, 30))
    pending = await engine.pull(ALPHA, 30)
    await engine.restart("a", NEW, KEY)
    assert await engine.reconcile() == 0
    await compute(engine, await engine.pull(NEWER, 20))
    assert await engine.reconcile() == 0
    assert len(await messages(fleet, NEW_LINE)) == 8
    await fleet.lease_runs_out()
    assert not any(await compute(engine, pending))
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "a"))
    assert await fleet.lengths() == []


@pytest.mark.parametrize("lost", ["stream", "entries", "group"])
async def test_what_gets_lost_is_queued_again_in_the_new_line(fleet: Fleet, lost: str) -> None:
    """The reconciler goes by the job as it is now, and adds to its present line alone."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    await compute(engine, await engine.pull(ALPHA, 20))
    await engine.restart("a", NEW, KEY)
    await compute(engine, await engine.pull(NEWER, 10))
    match lost:
        case "stream":
            await fleet.redis.delete(fleet.prefix + NEW_LINE)
        case "entries":
            await fleet.redis.delete(f"{fleet.prefix}entries:a")
        case "group":
            await fleet.redis.xgroup_destroy(fleet.prefix + NEW_LINE, GROUP)
    assert await engine.reconcile() == (0 if lost == "group" else 3)
    assert await fleet.keys("lane:") == [(fleet.prefix + NEW_LINE).encode()]
    assert (await engine.capacity()).backlog_rows == 30
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "a"))
    await engine.pull(ALPHA, 1)
    assert await fleet.lengths() == []


@pytest.mark.parametrize("delivered", [True, False])
async def test_stray_messages_of_the_old_line_are_dropped(fleet: Fleet, delivered: bool) -> None:
    """A message that nobody knew of brings no shard of the new line, and no death."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    for fields in await messages(fleet, OLD_LINE):
        await fleet.redis.xadd(fleet.prefix + OLD_LINE, fields)
    if delivered:
        await engine.start(leases := await engine.pull(ALPHA, 100))
        assert len(leases) == 8
    await engine.restart("a", NEW, KEY)
    assert len(await messages(fleet, OLD_LINE)) == 4
    if delivered:
        assert not any([await engine.commit(lease, votes(lease)) for lease in leases])
        await fleet.lease_runs_out()
    assert await engine.pull(ALPHA, 100) == []
    assert len(await messages(fleet, OLD_LINE)) == 0
    leases = await engine.pull(NEWER, 100)
    assert [lease.solitary for lease in leases] == [False] * 4
    assert all(await compute(engine, leases))
    assert_exact(await status_of(engine, "a"))
    assert await fleet.lengths() == []


async def test_a_stray_delivery_hides_no_death(fleet: Fleet) -> None:
    """One of the old line that runs out leaves alone what is known of the shard's new lease."""
    engine = fleet.engine
    await engine.submit(make_job("a", n0=0, n=SHARD_ROWS))
    (fields,) = await messages(fleet, OLD_LINE)
    await fleet.redis.xadd(fleet.prefix + OLD_LINE, fields)
    await engine.start(await engine.pull(ALPHA, 20))
    await engine.restart("a", NEW, KEY)
    await age(fleet.redis, fleet.prefix, LEASE_MS - 10_000)
    await engine.start(await engine.pull(NEWER, 10))
    await age(fleet.redis, fleet.prefix, LEASE_MS - 10_000)
    assert await engine.pull(ALPHA, 10) == []
    await fleet.lease_runs_out()
    assert [lease.solitary for lease in await engine.pull(NEWER, 10)] == [True]


async def test_streams_with_the_same_ids_are_told_apart(fleet: Fleet) -> None:
    """A lease of the old line is void though one of the new line has the very same token."""
    engine, line = fleet.engine, fleet.prefix + NEW_LINE
    await engine.submit(make_job("a", n0=0, n=SHARD_ROWS))
    (old,) = await engine.pull(ALPHA, 10)
    await engine.restart("a", NEW, KEY)
    (fields,) = await messages(fleet, NEW_LINE)
    await fleet.redis.delete(line)
    entry = old.token.split("/")[0]
    await fleet.redis.xadd(line, fields, id=entry)
    await fleet.redis.hset(f"{fleet.prefix}entries:a", "0", entry)
    (new,) = await engine.pull(Worker("alpha", {"default": NEW}), 10)
    assert new.token == old.token
    assert await engine.renew([old]) == []
    await engine.release([old])
    for _ in range(FAILURES_ALLOWED):
        await engine.fail(old, {"detail": "no"})
    assert await compute(engine, [old]) == [False]
    assert await engine.renew([new]) == [new]
    assert await compute(engine, [new]) == [True]
    assert_exact(await status_of(engine, "a"))


# Between two steps


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("repeated", [True, False])
async def test_a_restart_within_a_pull(
    fleet: Fleet, redis_server: RedisServer, cached: bool, repeated: bool
) -> None:
    """Shards that were taken before it never come with the new key: they are void, or do not come.

    `cached`: the process has the job as it was. `repeated`: the first reply of the pull got lost.
    """
    engine, ask = fleet.engine, fleet.engine._scripts.run
    another = RedisEngine(connect(redis_server.url), shard_rows=SHARD_ROWS, prefix=fleet.prefix)
    await engine.submit(make_job("a"))
    held = await engine.pull(ALPHA, 10) if cached else []
    restarts: list[bool] = []

    async def interrupted(name: str, *arguments: Any) -> Any:
        answer = await ask(name, *arguments)
        if name == "pull" and not restarts:
            restarts.append(await another.restart("a", NEW, KEY))
            answer = await ask(name, *arguments) if repeated else answer
            assert answer[0]
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._scripts, "run", interrupted)
        held += await engine.pull(BETA, 20)
    assert restarts == [True]
    assert len(held) == (3 if cached else 0)
    assert {lease.job.bundle for lease in held} <= {"bundle-a"}
    assert await engine.renew(held) == []
    leases = await engine.pull(NEWER, 100)
    assert {(lease.job.bundle, lease.job.key) for lease in leases} == {(NEW, KEY)}
    assert len(leases) == 4
    assert not any(await compute(engine, held))
    assert all(await compute(engine, leases))
    assert_exact(await status_of(engine, "a"))
    await another.close()


async def test_a_lost_reply_restarts_once(redis_server: RedisServer, fleet: Fleet) -> None:
    """A restart that was executed and never answered is made again, and changes nothing more."""
    await fleet.engine.submit(make_job("warm"))  # From here on Redis knows the script.
    await fleet.engine.restart("warm", NEW, KEY)
    await fleet.engine.cancel("warm")
    async with LosingReplies(redis_server.socket) as gap:
        engine = RedisEngine(connect(gap.url), shard_rows=SHARD_ROWS, prefix=fleet.prefix)
        await engine.submit(make_job("a"))
        await compute(engine, await engine.pull(ALPHA, 20))
        gap.marker = b'"bundle":"bundle-n"'
        await engine.restart("a", NEW, KEY)
        assert gap.lost == 1
        assert (await engine.capacity()).backlog_rows == 40
        await finish_everything(engine, NEWER)
        assert_exact(await status_of(engine, "a"))
        assert await fleet.lengths() == []
        await engine.close()


async def test_a_kill_of_redis_leaves_it_whole(own_server: RedisServer) -> None:
    """Killed with -9 after restarts, Redis comes back with every shard in its new line, once."""
    fleet = Fleet(own_server.url)
    engine, names = fleet.engine, [f"job-{number}" for number in range(6)]
    await engine.pull(ALPHA, 1)
    for name in names:
        await engine.submit(make_job(name, n=200))
    old = await engine.pull(ALPHA, 400)
    await compute(engine, old[:20])
    for name in names[:3]:
        assert await engine.restart(name, NEW, KEY)
    await written(fleet.redis)
    own_server.kill()
    own_server.start()
    assert await engine.reconcile() == 0
    for name in names[3:]:
        assert await engine.restart(name, NEW, KEY)
    await fleet.lease_runs_out()
    await engine.reconcile()
    assert not any(await compute(engine, old))
    assert (await engine.capacity()).backlog_rows == 6 * 210
    await finish_everything(engine, NEWER)
    for name in names:
        status = await status_of(engine, name)
        assert_exact(status)
        assert status.job.key == KEY
    assert await fleet.lengths() == []
    await fleet.close()


async def test_watchers_are_told_at_once(fleet: Fleet) -> None:
    """Other processes hear that the job changed; they need not look again to see it."""
    await fleet.engine.submit(make_job("a"))
    async with fleet.redis.pubsub() as channel:
        await channel.subscribe(f"{fleet.prefix}changed:a")
        await channel.get_message(timeout=30)
        await fleet.engine.restart("a", NEW, KEY)
        told = await channel.get_message(ignore_subscribe_messages=True, timeout=30)
    assert told is not None
    assert told["type"] == "message"


# What ends and what is left


async def test_a_job_that_began_anew_is_not_ended(redis_server: RedisServer) -> None:
    """One that leaves an unserved digest while jobs are being ended goes on under the other."""
    rollout = Rollout(redis_server.url)
    engine, look = rollout.engine, rollout.engine._scripts.run
    await engine.pull(ALPHA, 1)
    await engine.submit(make_job("a"))
    await rollout.look(NEWER, seconds=300)
    rollout.clock.advance(100)

    async def interrupted(name: str, *arguments: Any) -> Any:
        if name == "abandon":
            await engine.restart("a", NEW, KEY)
        return await look(name, *arguments)

    await engine.pull(NEWER, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._scripts, "run", interrupted)
        assert await engine.reconcile() == 0
    status = await status_of(engine, "a")
    assert (status.state, status.job.bundle) == (State.QUEUED, NEW)
    assert await rollout.look(NEWER, seconds=1_000) is State.QUEUED
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "a"))
    await rollout.fleet.redis.delete(*await rollout.fleet.keys())
    await rollout.fleet.close()


async def test_every_key_expires_with_its_job(fleet: Fleet) -> None:
    """No key is without a TTL, and none of the job outlives what it was given at its submission."""
    engine = fleet.engine
    await engine.submit(make_job("a"), idempotency_key="k")
    first = await fleet.redis.pexpiretime(f"{fleet.prefix}job:a")
    await compute(engine, await engine.pull(ALPHA, 20))
    await fleet.lease_runs_out()
    await engine.restart("a", NEW, KEY)
    await compute(engine, await engine.pull(NEWER, 20))
    assert [key for key in await fleet.keys() if await fleet.redis.pttl(key) == -1] == []
    for kind in ("job", "image", "done", "entries"):
        assert await fleet.redis.pexpiretime(f"{fleet.prefix}{kind}:a") < first
    await finish_everything(engine, NEWER)
    assert await fleet.redis.hgetall(f"{fleet.prefix}backlog") == {b"all": b"0"}
    for kind in ("lane:", "lines", "entries:", "done:", "image:", "opened"):
        assert await fleet.keys(kind) == []


async def test_a_lost_tally_is_thrown_away(fleet: Fleet) -> None:
    """What Redis lost of the old digest's count does not matter to the new one."""
    engine = fleet.engine
    await engine.submit(make_job("a"))
    await compute(engine, await engine.pull(ALPHA, 20))
    await fleet.redis.delete(f"{fleet.prefix}done:a", f"{fleet.prefix}backlog")
    await engine.restart("a", NEW, KEY)
    await engine.reconcile()
    assert (await engine.capacity()).backlog_rows == 40
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "a"))
