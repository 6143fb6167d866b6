"""Whether a Redis can be the engine's: its release, what this user may do, and what it evicts."""

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
    """A Redis that is not there to be used, or cannot be; the message says what to change."""


async def check_server(url: SecretStr, engine: RedisEngine) -> None:
    """Returns where the engine can work on the Redis at `url`; warns where that may evict keys.

    Raises RedisUnsuitable for a wrong password, missing rights, an unknown database and a release
    before 7.0, and redis.exceptions.RedisError where it is out of reach, or cannot do it just now.
    """
    try:
        async with aclosing(connect(url.get_secret_value())) as redis:
            await _check_version(redis)
            await engine.capacity()
            await _warn_of_eviction(redis)
    except (ReadOnlyError, OutOfMemoryError):
        raise
    except RedisError as error:
        # Over a Unix socket redis-py raises a refusal as the cause of a ConnectionError.
        refusal = error.__cause__ if isinstance(error, ConnectionError) else error
        if not isinstance(refusal, AuthenticationError | AuthorizationError | ResponseError):
            raise
        raise RedisUnsuitable(f"the Redis of VOUCHSAFE_REDIS_URL refuses: {refusal}") from error


async def _check_version(redis: Redis) -> None:
    """HELLO needs no rights at all, unlike INFO."""
    told = await redis.execute_command("HELLO")  # type: ignore[no-untyped-call]
    version = dict(zip(told[::2], told[1::2], strict=True))[b"version"].decode()
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise RedisUnsuitable(
            f"the Redis of VOUCHSAFE_REDIS_URL is release {version}; {least} or later is needed"
        )


async def _warn_of_eviction(redis: Redis) -> None:
    try:
        policy = (await redis.info("memory")).get("maxmemory_policy", "noeviction")
    except NoPermissionError:
        return  # A user with the least rights may not ask.
    if policy != "noeviction":
        _log.warning(
            "Redis evicts keys when its memory is full (maxmemory-policy %s), and jobs fail then: "
            "set it to noeviction",
            policy,
        )
