"""Checks of a Redis server: its release, the user's rights, and the eviction policy."""

from __future__ import annotations

import logging
from contextlib import aclosing

from pydantic import SecretStr
from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine

LEAST_VERSION = (7, 0)

_log = logging.getLogger("vouchsafe.engine")


class RedisUnsuitable(RuntimeError):
    """A Redis is missing or cannot serve the engine; the message names the remedy."""


async def check_server(url: SecretStr, engine: RedisEngine) -> None:
    """Check that the engine can use the Redis at `url`; warn where Redis may evict keys.

    Raises RedisUnsuitable for a wrong password, missing rights, an unknown database or a release
    before 7.0; redis.exceptions.RedisError where Redis is unreachable, or cannot run a call now.
    """
    try:
        async with aclosing(connect(url.get_secret_value())) as redis:
            await _check_version(redis)
            await engine.capacity()
            await _warn_of_eviction(redis)
    except (ReadOnlyError, OutOfMemoryError):
        raise
    except RedisError as error:
        # Over a Unix socket redis-py raises a rejection as the cause of a ConnectionError.
        rejection = error.__cause__ if isinstance(error, ConnectionError) else error
        if not isinstance(rejection, AuthenticationError | AuthorizationError | ResponseError):
            raise
        raise RedisUnsuitable(f"the Redis of VOUCHSAFE_REDIS_URL refuses: {rejection}") from error


async def _check_version(redis: Redis) -> None:
    """Raises RedisUnsuitable for an old release; HELLO needs no rights, unlike INFO."""
    hello = await redis.execute_command("HELLO")  # type: ignore[no-untyped-call]
    version = dict(zip(hello[::2], hello[1::2], strict=True))[b"version"].decode()
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise RedisUnsuitable(
            f"the Redis of VOUCHSAFE_REDIS_URL is release {version}; {least} or later is needed"
        )


async def _warn_of_eviction(redis: Redis) -> None:
    try:
        policy = (await redis.info("memory")).get("maxmemory_policy", "noeviction")
    except NoPermissionError:
        return  # A user with minimal rights may not run INFO.
    if policy != "noeviction":
        _log.warning(
            "Redis evicts keys when its memory is full (maxmemory-policy %s), and jobs fail then; "
            "set maxmemory-policy to noeviction",
            policy,
        )
