"""Queues lost shards of open jobs again, and fails the jobs that no worker serves."""

from __future__ import annotations

import logging

from service.engine.protocol import abandoned
from service.engine.redis.client import Scripts
from service.engine.redis.codec import flat, line_of, pairs, served, shards_of
from service.jobs import canonical_json

_log = logging.getLogger("vouchsafe.engine")


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
