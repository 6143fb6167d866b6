"""service/engine/redis/requirements.py: which Redis is refused, and which is warned of."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from benchmarks.redis_server import RedisServer
from service.engine.options import EngineOptions
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.engine.redis.requirements import RedisUnsuitable, check_server

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


async def check(url: str) -> None:
    engine = RedisEngine(
        connect(url), EngineOptions(shard_rows=64), prefix=f"{{{secrets.token_hex(8)}}}:"
    )
    try:
        await check_server(SecretStr(url), engine)
    finally:
        await engine.close()


@asynccontextmanager
async def user(server: RedisServer, *rights: str) -> AsyncIterator[str]:
    """The URL of an ACL user with these rights."""
    admin: Redis = Redis.from_url(server.url)
    name = f"user-{secrets.token_hex(4)}"
    await admin.execute_command("ACL", "SETUSER", name, "on", ">s3cret", *rights)
    yield server.url_for(f"{name}:s3cret")
    await admin.execute_command("ACL", "DELUSER", name)
    await admin.aclose()


async def test_evicting_server_is_warned_of(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that evicts nothing passes in silence; one that would is named."""
    await check(redis_server.url)
    assert caplog.messages == []
    admin: Redis = Redis.from_url(redis_server.url)
    await admin.config_set("maxmemory-policy", "allkeys-lru")
    await check(redis_server.url)
    async with user(redis_server, "~*", "&*", "+@all", "-info") as url:
        await check(url)
    await admin.config_set("maxmemory-policy", "noeviction")
    await admin.aclose()
    assert [message for message in caplog.messages if "allkeys-lru" in message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "rights",
    [("~*", "&*", "+@connection"), ("~*", "&*", "+@connection", "+@scripting"), ("~a", "+@all")],
    ids=["no script", "nothing in scripts", "other keys"],
)
async def test_missing_rights_are_refused(
    redis_server: RedisServer, rights: tuple[str, ...]
) -> None:
    """A user who may not do what the engine does is refused, without the password."""
    async with user(redis_server, *rights) as url:
        with pytest.raises(RedisUnsuitable, match="refuses") as told:
            await check(url)
    assert "s3cret" not in str(told.value)


@pytest.mark.parametrize(("user", "database"), [(":wrong", 0), ("", 99)])
async def test_wrong_password_or_database_is_refused(
    redis_server: RedisServer, user: str, database: int
) -> None:
    """So is a password that is not the user's, and a database that is not there."""
    with pytest.raises(RedisUnsuitable, match="refuses"):
        await check(redis_server.url_for(user, database))


async def test_old_server_is_refused() -> None:
    """A server that says of itself that it is 6.2 is refused by its release."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while header := await reader.readline():
            words = []
            for _ in range(int(header[1:])):
                await reader.readline()
                words.append((await reader.readline()).strip().upper())
            hello = b"*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n6.2.14\r\n"
            writer.write(hello if words[0] == b"HELLO" else b"+OK\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RedisUnsuitable, match=r"release 6\.2\.14; 7\.0 or later"):
            await check(f"redis://127.0.0.1:{port}/0")


async def test_server_out_of_reach_is_not_refused() -> None:
    """Nobody there is no verdict: the connection's own error is raised."""
    with pytest.raises(ConnectionError):
        await check("redis://127.0.0.1:1/0")
