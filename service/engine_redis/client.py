"""The connection to Redis, and the Lua scripts that run there as one step each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError, ReadOnlyError

from service.jobs import canonical_json

T = TypeVar("T")

_SCRIPTS = Path(__file__).parent / "scripts"

BACKOFF = ExponentialWithJitterBackoff(base=0.05, cap=2.0)
"""Seconds before the next try: longer each time, up to 2, jittered."""

_RETRIES = 6
_MOST_CONNECTIONS = 64


def connect(url: str) -> Redis:
    """A client of the server at `url`, a Redis >= 7.0; nothing is sent yet.

    A lost connection, a server that is loading its data (LOADING) and one that has become a replica
    (READONLY) are retried on a new connection for some seconds before the error is raised.
    """
    network = {"socket_connect_timeout": 2, "socket_keepalive": True}
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MOST_CONNECTIONS,
        timeout=10,
        socket_timeout=10,
        retry=Retry(BACKOFF, _RETRIES),
        retry_on_error=[ReadOnlyError],
        protocol=2,
        client_name="vouchsafe",
        **({} if url.startswith("unix:") else network),
    )
    return Redis.from_pool(pool)


class Scripts:
    """The engine's scripts under one prefix; `terms` are the numbers that they go by.

    `clock` gives the Unix seconds that are written down; the server's own time unless given.
    """

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        terms: Mapping[str, Any],
        clock: Callable[[], float] | None = None,
    ) -> None:
        common = (_SCRIPTS / "common.lua").read_text()
        self._prefix = prefix
        self._terms = canonical_json(terms)
        self._clock = clock
        self._redis = redis
        self._texts = {
            path.stem: common + path.read_text()
            for path in _SCRIPTS.glob("*.lua")
            if path.stem != "common"
        }
        self._digests = {name: _sha1(text) for name, text in self._texts.items()}

    async def run(self, name: str, *arguments: str | bytes | float) -> Any:
        """The reply of one script, as Redis gives it: strings are bytes, missing ones None."""
        now = "" if self._clock is None else self._clock()
        passed = (self._prefix, self._terms, now, *arguments)
        try:
            return await answered(self._redis.evalsha(self._digests[name], 1, *passed))
        except NoScriptError:  # EVAL needs no script loaded before, however often Redis restarts.
            return await answered(self._redis.eval(self._texts[name], 1, *passed))


async def answered(reply: Awaitable[T]) -> T:
    """What Redis replies, for a task that has not been cancelled meanwhile.

    The client sends under `asyncio.wait_for`, which loses a cancellation that comes just as it
    returns (CPython before 3.12).
    """
    told = await reply
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
    return told


def _sha1(text: str) -> str:
    """The name that Redis gives a script."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
