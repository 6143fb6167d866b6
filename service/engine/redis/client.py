"""Connection to Redis, and the Lua scripts, each of which Redis runs as one step."""

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
_SHARED = ("common", "jobs", "sweep")

BACKOFF = ExponentialWithJitterBackoff(base=0.05, cap=2.0)
"""Seconds before the next try: longer after each failure, up to 2, jittered."""

_WRITTEN = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
_RETRIES = 6
_MAX_CONNECTIONS = 64


def connect(url: str) -> Redis:
    """A client of the server at `url`, a Redis >= 7.0; sends nothing yet.

    The client retries for some seconds, each time on a new connection, after:

    - a lost connection,
    - LOADING, from a server that loads its data,
    - READONLY, from a server that has become a replica.

    Calls raise the error of the last try. A call without a reply for 5 seconds raises TimeoutError
    at once.
    """
    network = {"socket_connect_timeout": 2, "socket_keepalive": True}
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
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
    """A call of a script: its name, its key and arguments, and the future of its reply."""

    name: str
    arguments: tuple[Any, ...]
    reply: asyncio.Future[Any]


class Scripts:
    """The engine's scripts over the keys that begin with `prefix`.

    `terms` are the scripts' limits and times. `clock` gives the Unix seconds that scripts write;
    Redis's time unless given.

    Calls of one turn of the event loop share a round trip. A call whose reply was lost is repeated,
    so every script must be safe to run twice.
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
        """The reply of one script, as Redis returns it: strings are bytes, missing ones None.

        Raises redis.exceptions.RedisError.
        """
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
        """Drop the calls without a reply; they raise ConnectionError, as for a lost connection."""
        for sending in self._sending:
            sending.cancel()
        try:
            await asyncio.gather(*self._sending, return_exceptions=True)
        finally:
            calls, self._calls = self._calls, []
            _abort(calls)

    async def _send(self) -> None:
        calls, self._calls = self._calls, []
        try:
            replies = await self._replies(calls)
        except asyncio.CancelledError:
            _abort(calls)
            raise
        except Exception as error:
            replies = [error] * len(calls)
        for call, reply in zip(calls, replies, strict=True):
            if call.reply.done():
                continue  # The caller was cancelled.
            if isinstance(reply, Exception):
                call.reply.set_exception(reply)
            else:
                call.reply.set_result(reply)

    async def _replies(self, calls: Sequence[_Call]) -> list[Any]:
        """The reply of every call, or its error."""
        if len(calls) == 1:
            return [await self._run_one(calls[0])]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.evalsha(self._digests[call.name], 1, *call.arguments)
            replies = await pipeline.execute(raise_on_error=False)
        for at, reply in enumerate(replies):
            if isinstance(reply, (NoScriptError, ReadOnlyError)):  # The script has not run.
                try:
                    replies[at] = await self._run_one(calls[at])
                except RedisError as error:
                    replies[at] = error
        return list(replies)

    async def _run_one(self, call: _Call) -> Any:
        try:
            return await self._redis.evalsha(self._digests[call.name], 1, *call.arguments)
        except NoScriptError:  # EVAL needs no loaded script; a restart of Redis drops them.
            return await self._redis.eval(self._texts[call.name], 1, *call.arguments)


def _abort(calls: Sequence[_Call]) -> None:
    """Raise in the callers that wait; cancelled futures would cancel the callers' tasks."""
    for call in calls:
        if not call.reply.done():
            call.reply.set_exception(ConnectionError("this process closed the connection"))


async def answered(reply: Awaitable[T]) -> T:
    """The reply of Redis.

    Raises CancelledError where the task was cancelled meanwhile: the client sends under
    `asyncio.wait_for`, which may lose a cancellation as it returns (CPython before 3.12).
    """
    result = await reply
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
    return result


async def persists(redis: Redis) -> bool | None:
    """Whether Redis's last writes to disk succeeded; None where its user may not run INFO."""
    try:
        info = await answered(redis.info("persistence"))
    except NoPermissionError:
        return None
    return all(info.get(name, "ok") == "ok" for name in _WRITTEN)


def _sha1(text: str) -> str:
    """The name that Redis gives a script."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
