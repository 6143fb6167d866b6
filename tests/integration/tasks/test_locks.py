"""service/tasks/lock.py on a real redis-server: one holder, extended, lost."""

from __future__ import annotations

import secrets
from contextlib import aclosing

import pytest

from benchmarks.redis_server import RedisServer
from service.engine.redis.client import connect
from service.tasks.lock import LocalLocks, RedisLocks
from tests.support.adapting import until, until_extended

RIGHTS = "-@all +@read +@write +@pubsub +@scripting +@connection +@transaction +time"


@pytest.fixture
def prefix() -> str:
    return f"{{{secrets.token_hex(8)}}}:"


def locks_of(url: str, prefix: str, seconds: float = 30) -> RedisLocks:
    return RedisLocks(connect(url), seconds=seconds, prefix=prefix)


async def test_one_holder(redis_server: RedisServer, prefix: str) -> None:
    """A job's lock has one holder, until that releases it; another job's is free."""
    mine, theirs = (locks_of(redis_server.url, prefix) for _ in range(2))
    async with aclosing(mine), aclosing(theirs):
        async with mine.acquire("a") as held:
            assert held is not None
            assert held.is_held
            async with theirs.acquire("a") as taken, theirs.acquire("b") as another:
                assert taken is None
                assert another is not None
        async with theirs.acquire("a") as taken:
            assert taken is not None


async def test_extended_until_it_is_lost(redis_server: RedisServer, prefix: str) -> None:
    """A lock is extended while its holder lives; one that another has taken meanwhile is lost, and
    not released by the holder that lost it."""
    locks, redis = locks_of(redis_server.url, prefix, 12), connect(redis_server.url)
    async with aclosing(locks), aclosing(redis):
        async with locks.acquire("a") as held:
            assert held is not None
            token = await redis.get(f"{prefix}adaptation:a")
            await until_extended(redis, f"{prefix}adaptation:a")
            assert await redis.get(f"{prefix}adaptation:a") == token
            await redis.set(f"{prefix}adaptation:a", "another")
            await until(lambda: not held.is_held)
        assert await redis.get(f"{prefix}adaptation:a") == b"another"


async def test_least_rights_are_enough(own_server: RedisServer, prefix: str) -> None:
    """An ACL user with the rights that the engine needs can hold, extend and release a lock."""
    redis = connect(own_server.url)
    locks = locks_of(own_server.url_for("fleet:s3cret"), prefix, 6)
    async with aclosing(redis), aclosing(locks):
        user = "ACL", "SETUSER", "fleet", "on", ">s3cret", f"~{prefix}*", *RIGHTS.split()
        await redis.execute_command(*user)
        async with locks.acquire("a") as held:
            assert held is not None
            await until_extended(redis, f"{prefix}adaptation:a")
        assert not await redis.exists(f"{prefix}adaptation:a")


async def test_on_one_machine() -> None:
    """Without a fleet every lock is free, and never lost: the file in the job's folder decides."""
    async with LocalLocks().acquire("a") as mine, LocalLocks().acquire("a") as theirs:
        assert mine is not None
        assert theirs is not None
        assert mine.is_held
