"""A worker over Redis without a model: `python -m tests.support.redis_worker URL PREFIX NAME`.

Commits the fakes' votes, some of them twice, until the queues have been empty for a second (ten
minutes at first). Then prints how many of its commits were counted.
"""

from __future__ import annotations

import asyncio
import sys

from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from tests.support.fakes import fake_votes


async def main(url: str, prefix: str, name: str) -> int:
    """Work, and return how many commits were counted."""
    engine = RedisEngine(connect(url), EngineOptions(shard_rows=10), prefix=prefix, poll_seconds=1)
    counted = 0
    worker = Worker(name, {"default": "bundle-a"})
    leases = await engine.pull(worker, 20)
    for _ in range(600):  # Its first work may be late.
        leases = leases or await engine.pull(worker, 20)
    while leases:
        await engine.start(leases)
        for lease in [*leases, leases[0]]:
            shard, key = lease.shard, lease.job.domain_key(lease.shard.domain)
            votes = fake_votes(key, range(shard.start, shard.stop), lease.job.classes)
            counted += await engine.commit(lease, votes)
        leases = await engine.pull(worker, 20)
    await engine.close()
    return counted


if __name__ == "__main__":
    print(asyncio.run(main(*sys.argv[1:])))
