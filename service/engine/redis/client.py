"""The connection to Redis, and the Lua scripts that run there as one step each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
)

from service.jobs import canonical_json

T = TypeVar("T")

_SCRIPTS = Path(__file__).parent / "scripts"
_SHARED = ("common", "sweep")

BACKOFF = ExponentialWithJitterBackoff(base=0.05, cap=2.0)
"""Seconds before the next try: longer each time, up to 2, jittered."""

_WRITTEN = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
_RETRIES = 6
_MOST_CONNECTIONS = 64


def connect(url: str) -> Redis:
    """A client of the server at `url`, a Redis >= 7.0; nothing is sent yet.

    A lost connection, a server that is loading its data (LOADING) and one that has become a replica
    (READONLY) are retried on a new connection for some seconds before the error is raised. One that
    does not answer within 5 seconds raises TimeoutError at once.
    """
    network = {"socket_connect_timeout": 2, "socket_keepalive": True}
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MOST_CONNECTIONS,
        timeout=10,
        socket_timeout=5,
        retry=Retry(BACKOFF, _RETRIES, (ConnectionError,)),
        retry_on_error=[ReadOnlyError],
        protocol=2,
        client_name="vouchsafe",
        **({} if url.startswith("unix:") else network),
    )
    return Redis.from_pool(pool)


@dataclass(slots=True, eq=False)
class _Call:
    """A script to run, with what it is given, and who waits for its reply."""

    name: str
    passed: tuple[Any, ...]
    reply: asyncio.Future[Any]


class Scripts:
    """The engine's scripts under one prefix; `terms` are the numbers that they go by.

    `clock` gives the Unix seconds that are written down; the server's own time unless given. Calls
    made in one turn of the event loop travel together, in one round trip. A call whose reply got
    lost is made again, so every script must bear being run twice.
    """

    def __init__(
        self,
        redis: Redis,
        prefix: str,
        terms: Mapping[str, Any],
        clock: Callable[[], float] | None = None,
    ) -> None:
        shared = "".join((_SCRIPTS / f"{name}.lua").read_text() for name in _SHARED)
        self._prefix = prefix
        self._terms = canonical_json(terms)
        self._clock = clock
        self._redis = redis
        self._texts = {
            path.stem: shared + path.read_text()
            for path in _SCRIPTS.glob("*.lua")
            if path.stem not in _SHARED
        }
        self._digests = {name: _sha1(text) for name, text in self._texts.items()}
        self._calls: list[_Call] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self, name: str, *arguments: str | bytes | float) -> Any:
        """The reply of one script, as Redis gives it: strings are bytes, missing ones None."""
        now = "" if self._clock is None else self._clock()
        passed = (self._prefix, self._terms, now, *arguments)
        call = _Call(name, passed, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        if len(self._calls) == 1:
            sending = asyncio.create_task(self._send())
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        return await call.reply

    async def close(self) -> None:
        """Give up what has no reply yet: whoever waits for it is told as of a lost connection."""
        for sending in self._sending:
            sending.cancel()
        try:
            await asyncio.gather(*self._sending, return_exceptions=True)
        finally:
            calls, self._calls = self._calls, []
            _give_up(calls)

    async def _send(self) -> None:
        calls, self._calls = self._calls, []
        try:
            replies = await self._replies(calls)
        except asyncio.CancelledError:
            _give_up(calls)
            raise
        except Exception as error:
            replies = [error] * len(calls)
        for call, reply in zip(calls, replies, strict=True):
            if call.reply.done():
                continue  # Whoever asked was cancelled.
            if isinstance(reply, Exception):
                call.reply.set_exception(reply)
            else:
                call.reply.set_result(reply)

    async def _replies(self, calls: Sequence[_Call]) -> list[Any]:
        """What every call is answered, be it an error."""
        if len(calls) == 1:
            return [await self._alone(calls[0])]
        async with self._redis.pipeline(transaction=False) as together:
            for call in calls:
                together.evalsha(self._digests[call.name], 1, *call.passed)
            replies = await together.execute(raise_on_error=False)
        for at, reply in enumerate(replies):
            if isinstance(reply, (NoScriptError, ReadOnlyError)):  # It has done nothing yet.
                try:
                    replies[at] = await self._alone(calls[at])
                except RedisError as error:
                    replies[at] = error
        return list(replies)

    async def _alone(self, call: _Call) -> Any:
        try:
            return await self._redis.evalsha(self._digests[call.name], 1, *call.passed)
        except NoScriptError:  # EVAL needs no script loaded before, however often Redis restarts.
            return await self._redis.eval(self._texts[call.name], 1, *call.passed)


def _give_up(calls: Sequence[_Call]) -> None:
    """Tell whoever still waits; a cancellation would end tasks that nobody has cancelled."""
    for call in calls:
        if not call.reply.done():
            call.reply.set_exception(ConnectionError("the connection was closed here"))


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


async def persists(redis: Redis) -> bool | None:
    """Whether all that Redis last wrote to its disk got there; None where it may not be asked."""
    try:
        told = await answered(redis.info("persistence"))
    except NoPermissionError:
        return None
    return all(told.get(name, "ok") == "ok" for name in _WRITTEN)


def _sha1(text: str) -> str:
    """The name that Redis gives a script."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
