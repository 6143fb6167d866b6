"""Shards per second through Redis without a device: `python -m benchmarks.redis_shards --url URL`.

Processes pull, start and commit shards as workers do, with synthetic votes. The jobs are queued
before the clock starts. Uses keys below a random prefix and deletes them. Prints the speed and
Redis's share of a core, calls and bytes per shard.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import time
from typing import Any

from service.engine.options import EngineOptions
from service.engine.protocol import Lease, Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import Job, Mode

WORKER_BUNDLES = {"default": "d" * 64}
LABELS = 10


def _engine(url: str, prefix: str, options: argparse.Namespace) -> RedisEngine:
    return RedisEngine(
        connect(url),
        EngineOptions(
            shard_rows=options.shard_rows, max_queue_rows=2 * options.jobs * options.rows
        ),
        prefix=prefix,
        poll_seconds=0.2,
    )


def made_up_job(options: argparse.Namespace) -> Job:
    side = options.side
    return Job(
        id=secrets.token_urlsafe(16),
        task="default",
        task_digest="made up",
        bundle=WORKER_BUNDLES["default"],
        mode=Mode.CERTIFY,
        sigma=0.25,
        alpha=0.001,
        n0=0,
        n=options.rows,
        classes=LABELS,
        shape=(3, side, side),
        pixels=os.urandom(3 * side * side),
        key=secrets.token_bytes(32),
        created=time.time(),
    )


def made_up_votes(lease: Lease) -> list[int]:
    votes = [0] * LABELS
    votes[lease.shard.index % LABELS] = lease.shard.rows
    return votes


async def _drain(url: str, prefix: str, options: argparse.Namespace) -> None:
    """Work until the queues are empty."""
    engine = _engine(url, prefix, options)
    worker = Worker(f"bench-{os.getpid()}", WORKER_BUNDLES)
    computed: list[Lease] = []
    held = await engine.pull(worker, options.batch_rows)
    while held or computed:  # The last batch is reported while the next starts, as a worker does.
        commits = [engine.commit(lease, made_up_votes(lease)) for lease in computed]
        following = engine.pull(worker, options.batch_rows)
        _, computed, held = await asyncio.gather(
            asyncio.gather(*commits), engine.start(held), following
        )
    await engine.close()


def _process(url: str, prefix: str, options: argparse.Namespace, ready: Any, go: Any) -> None:
    ready.release()
    go.wait()
    asyncio.run(_drain(url, prefix, options))


async def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Queue the jobs, let the processes drain them, and check that every row was counted once."""
    prefix = f"{{bench-{secrets.token_hex(8)}}}:"
    engine, redis = _engine(options.url, prefix, options), connect(options.url)
    spawn = multiprocessing.get_context("spawn")
    ready, go = spawn.Semaphore(0), spawn.Event()
    processes = [
        spawn.Process(target=_process, args=(options.url, prefix, options, ready, go))
        for _ in range(options.processes)
    ]
    for process in processes:
        process.start()
    try:
        await engine.pull(Worker("queueing", WORKER_BUNDLES), 1)
        jobs = [await engine.submit(made_up_job(options)) for _ in range(options.jobs)]
        for _ in processes:
            await asyncio.to_thread(ready.acquire)
        before, began = await redis.info("everything"), time.perf_counter()
        go.set()
        while (await engine.capacity()).backlog_rows:  # noqa: ASYNC110 - the work is elsewhere.
            await asyncio.sleep(0.02)
        seconds, after = time.perf_counter() - began, await redis.info("everything")
        for process in processes:
            await asyncio.to_thread(process.join)
        statuses = [await engine.status(job) for job in jobs]
        if any(status is None or sum(status.estimation) != options.rows for status in statuses):
            raise RuntimeError("rows were lost or counted twice")
    finally:
        async for key in redis.scan_iter(match=f"{prefix}*"):
            await redis.delete(key)
        await redis.aclose()
        await engine.close()
    return _figures(options, before, after, seconds)


def _figures(
    options: argparse.Namespace, before: dict[str, Any], after: dict[str, Any], seconds: float
) -> dict[str, Any]:
    shards = options.jobs * -(-options.rows // options.shard_rows)

    def used(*names: str) -> float:
        return float(sum(after[name] - before[name] for name in names))

    return {
        "shards": shards,
        "seconds": round(seconds, 2),
        "shards/s": round(shards / seconds),
        "Redis, share of a core": round(used("used_cpu_sys", "used_cpu_user") / seconds, 2),
        "calls a shard, those inside scripts too": round(
            used("total_commands_processed") / shards, 1
        ),
        "bytes a shard to Redis": round(used("total_net_input_bytes") / shards),
        "bytes a shard from Redis": round(used("total_net_output_bytes") / shards),
    }


def main() -> None:
    """Read the command line, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="redis://127.0.0.1:6379/0", help="a Redis >= 7.0")
    parser.add_argument("--processes", type=int, default=2, help="workers")
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--rows", type=int, default=10_048, help="noise rows of each job")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--batch-rows", type=int, default=1024, help="rows a worker pulls at once")
    parser.add_argument("--side", type=int, default=32, help="height and width of an image")
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measured(options)), indent=2))


if __name__ == "__main__":
    main()
