"""Tallies under injected worker crashes, counted in two steps and in one.

`python -m benchmarks.count_then_ack --url URL` counts the same jobs twice over Redis. Workers crash
at random after a shard's votes are counted and before they are acknowledged. The shard is then
delivered again. Prints how many jobs end with votes that were counted twice, or not at all. Uses
keys below a random prefix and deletes them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
from typing import Any

from redis.asyncio import Redis

from benchmarks.redis_shards import LABELS, WORKER_BUNDLES, made_up_job, made_up_votes
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import Job

Tallies = list[tuple[int, ...]]
GROUP = "workers"


async def two_steps(
    redis: Redis, prefix: str, jobs: list[Job], options: argparse.Namespace
) -> Tallies:
    """A stream read by a group; the worker adds up the votes, then acknowledges the shard."""
    chance, stream = random.Random(options.seed), f"{prefix}shards"
    await redis.xgroup_create(stream, GROUP, "0", mkstream=True)
    for number, job in enumerate(jobs):
        for shard in job.shards(options.shard_rows):
            fields = {"job": number, "label": shard.index % LABELS, "rows": shard.rows}
            await redis.xadd(stream, fields)
    while True:  # A crashed worker's shards are claimed first, as if their leases had expired.
        _, entries, _ = await redis.xautoclaim(stream, GROUP, "worker", 0, count=1)
        if not entries:
            read = await redis.xreadgroup(GROUP, "worker", {stream: ">"}, count=1)
            entries = read[0][1] if read else []
        if not entries:
            break
        ((entry, fields),) = entries
        tally = f"{prefix}votes:{int(fields[b'job'])}"
        await redis.hincrby(tally, fields[b"label"].decode(), int(fields[b"rows"]))
        if chance.random() >= options.deaths:
            await redis.xack(stream, GROUP, entry)
    stored = [await redis.hgetall(f"{prefix}votes:{number}") for number in range(len(jobs))]
    return [tuple(int(votes.get(b"%d" % k, 0)) for k in range(LABELS)) for votes in stored]


async def one_script(
    redis: Redis, prefix: str, jobs: list[Job], options: argparse.Namespace
) -> Tallies:
    """Tallies of the engine, whose commit counts and acknowledges; an unconfirmed commit is
    repeated.

    As many workers crash just before the commit: their leases expire, and others take the shards.
    """
    chance, worker = random.Random(options.seed), Worker("worker", WORKER_BUNDLES)
    engine = RedisEngine(
        connect(options.url),
        EngineOptions(
            shard_rows=options.shard_rows,
            lease_seconds=0.2,
            max_queue_rows=2 * options.jobs * options.rows,
        ),
        prefix=prefix,
        poll_seconds=0.05,
        sweep_seconds=0.01,
    )
    await engine.pull(worker, 1)
    for job in jobs:
        await engine.submit(job)
    while (await engine.capacity()).backlog_rows:
        for lease in await engine.pull(worker, 1):
            if chance.random() < options.deaths:
                continue
            await engine.commit(lease, made_up_votes(lease))
            if chance.random() < options.deaths:
                await engine.commit(lease, made_up_votes(lease))
    statuses = [await engine.status(job.id) for job in jobs]
    await engine.close()
    return [status.estimation if status else () for status in statuses]


async def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The number of jobs with wrong tallies, each way."""
    shards = -(-options.rows // options.shard_rows)
    figures: dict[str, Any] = {"jobs": options.jobs, "shards a job": shards}
    jobs = [made_up_job(options) for _ in range(options.jobs)]
    wanted = [0] * LABELS
    for shard in jobs[0].shards(options.shard_rows):
        wanted[shard.index % LABELS] += shard.rows
    for way in (two_steps, one_script):
        redis, prefix = connect(options.url), f"{{bench-{secrets.token_hex(8)}}}:"
        try:
            tallies = await way(redis, prefix, jobs, options)
        finally:
            async for key in redis.scan_iter(match=f"{prefix}*"):
                await redis.delete(key)
            await redis.aclose()
        figures[f"wrong with {way.__name__}"] = sum(tally != tuple(wanted) for tally in tallies)
    return figures


def main() -> None:
    """Read the command line, count both ways, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="redis://127.0.0.1:6379/0", help="a Redis >= 7.0")
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--rows", type=int, default=3_000, help="noise rows of each job")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--deaths", type=float, default=0.05, help="chance of one at each shard")
    parser.add_argument("--side", type=int, default=32, help="height and width of an image")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(asyncio.run(measured(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
