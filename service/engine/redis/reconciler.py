"""What open jobs miss in the streams, and open jobs that no worker is left for."""

from __future__ import annotations

import logging

from service.engine.protocol import abandoned
from service.engine.redis.client import Scripts
from service.engine.redis.codec import flat, line_of, pairs, served, shards_of
from service.jobs import canonical_json

_log = logging.getLogger("vouchsafe.engine")


async def reconcile(scripts: Scripts) -> int:
    """Queue missing shards of open jobs again and fail the jobs of lines that went unserved.

    Returns how many shards were queued.
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
        lines = ", ".join(sorted(line.decode() for line in late))
        _log.warning("%d jobs ended that no worker serves any more: %s", ended, lines)
    return requeued


async def _unserved(scripts: Scripts) -> set[bytes]:
    """The lines that went unserved too long; none while no worker at all is alive."""
    _, _, announcements, _ = await scripts.run("capacity")
    lines = [line_of(*item) for item in served(announcements)]
    return set(await scripts.run("unserved", *lines)) if lines else set()
