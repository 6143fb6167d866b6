"""Queues lost shards of open jobs again, and fails the jobs that no worker serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from service.engine.protocol import abandoned
from service.engine.redis.client import Scripts
from service.engine.redis.codec import flat, line_of, pairs, served, shards_of
from service.jobs import canonical_json

_log = logging.getLogger("vouchsafe.engine")


class BackgroundReconciler:
    """Calls `reconcile` in the background, once per `seconds` among all processes.

    The processes take turns by the key `turn`.
    """

    def __init__(
        self, redis: Redis, turn: str, seconds: float, reconcile: Callable[[], Awaitable[int]]
    ) -> None:
        self._redis = redis
        self._turn = turn
        self._seconds = seconds
        self._reconcile = reconcile
        self._last = float("-inf")
        self._running: asyncio.Task[None] | None = None

    def start_if_due(self) -> None:
        """Start a turn, unless this process did so within `seconds` or still works at one."""
        now = asyncio.get_running_loop().time()
        busy = self._running is not None and not self._running.done()
        if not busy and now >= self._last + self._seconds:
            self._last = now
            self._running = asyncio.create_task(self._take_turn())

    async def close(self) -> None:
        """Cancel a turn in progress."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def _take_turn(self) -> None:
        milliseconds = max(1, round(self._seconds * 1000))
        try:
            if await self._redis.set(self._turn, "", nx=True, px=milliseconds):
                await self._reconcile()
        except (RedisError, OSError) as error:
            _log.warning(
                "open jobs were not reconciled with the streams (%s); trying again in %.0f s",
                error,
                self._seconds,
            )


async def reconcile(scripts: Scripts) -> int:
    """Queue missing shards of open jobs again, and fail the jobs of unserved queues.

    Returns the number of queued shards.
    """
    late = await _unserved(scripts)
    requeued, ended = 0, 0
    for name in await scripts.run("opened"):
        fields = pairs(await scripts.run("status", name))
        if fields.get(b"line") in late:
            problem = canonical_json(abandoned(name.decode()))
            if await scripts.run("abandon", name, problem):
                ended += 1
                continue
        shards = shards_of(fields) if fields else ()
        requeued += await scripts.run("requeue", name, *flat(shards))
    if ended:
        queues = ", ".join(sorted(name.decode() for name in late))
        _log.warning("%d jobs failed: no worker serves their digest any more: %s", ended, queues)
    return requeued


async def _unserved(scripts: Scripts) -> set[bytes]:
    """The queues unserved for longer than allowed; none while no worker is alive."""
    _, _, announcements, _ = await scripts.run("capacity")
    queues = [line_of(*item) for item in served(announcements)]
    return set(await scripts.run("unserved", *queues)) if queues else set()
