"""Redis's cost of each step of a fleet: `python -m benchmarks.redis_steps --url URL --workers N`.

N workers have announced themselves and are subscribed. Then each step is repeated, and Redis's
processor time is divided by the number of repetitions. Uses keys below a random prefix and deletes
them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from benchmarks.redis_shards import WORKER_BUNDLES, made_up_job, made_up_votes
from service.engine.options import EngineOptions
from service.engine.protocol import Lease, Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine

Step = Callable[[], Awaitable[object]]


async def milliseconds(redis: Redis, times: int, step: Step) -> float:
    """Redis's processor time for one step, the mean of `times`."""
    before = await _processor_seconds(redis)
    for _ in range(times):
        await step()
    return round(1000 * (await _processor_seconds(redis) - before) / times, 3)


async def _processor_seconds(redis: Redis) -> float:
    figures = await redis.info("cpu")
    return float(figures["used_cpu_user"] + figures["used_cpu_sys"])


@asynccontextmanager
async def listeners(url: str, channel: str, number: int) -> AsyncIterator[None]:
    """`number` connections subscribed to the channel, which read its messages."""
    host, port = url.split("/")[2].rsplit("@")[-1].split(":")
    ended: list[asyncio.Task[None]] = []
    writers = []

    async def read(reader: asyncio.StreamReader) -> None:
        while await reader.read(1 << 16):
            pass

    for _ in range(number):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"SUBSCRIBE {channel}\r\n".encode())
        await reader.readuntil(b":1\r\n")
        ended.append(asyncio.create_task(read(reader)))
        writers.append(writer)
    try:
        yield
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*ended, return_exceptions=True)


async def measured(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of Redis for each step."""
    prefix = f"{{bench-{secrets.token_hex(8)}}}:"
    redis = connect(options.url)
    engine = RedisEngine(
        connect(options.url),
        EngineOptions(shard_rows=options.shard_rows, max_queue_rows=10**9),
        prefix=prefix,
        poll_seconds=0.001,
    )
    figures: dict[str, float] = {}
    shards = -(-options.rows // options.shard_rows)
    jobs: list[str] = []
    leases: list[Lease] = []

    async def submit() -> None:
        jobs.append(await engine.submit(made_up_job(options)))

    async def pull() -> None:
        leases.extend(await engine.pull(Worker("worker-0", WORKER_BUNDLES), 1))

    async def start() -> None:
        await engine.start([started.pop()])

    async def commit() -> None:
        lease = leases.pop(0)
        await engine.commit(lease, made_up_votes(lease))

    try:
        for number in range(options.workers):
            await engine.pull(Worker(f"worker-{number}", WORKER_BUNDLES), 1)
        figures["a pull that finds nothing"] = await milliseconds(redis, options.times, pull)
        figures["capacity"] = await milliseconds(redis, options.times, engine.capacity)
        figures["a submission"] = await milliseconds(redis, options.times, submit)
        figures["the state of the queue"] = await milliseconds(redis, options.times, engine.stats)
        figures["a status"] = await milliseconds(
            redis, options.times, lambda: engine._scripts.run("status", jobs[0])
        )
        many = min(options.times * shards, 1000)
        figures["a pull of one shard"] = await milliseconds(redis, many, pull)
        started = list(leases)
        figures["a start"] = await milliseconds(redis, len(started), start)
        figures["a commit"] = await milliseconds(redis, len(leases), commit)
        figures["a read of an image"] = await milliseconds(
            redis, options.times, lambda: redis.get(f"{prefix}image:{jobs[-1]}")
        )
        channel = f"{prefix}heard"
        async with listeners(options.url, channel, options.workers):
            figures["a message to all workers"] = await milliseconds(
                redis, options.times, lambda: redis.publish(channel, "")
            )
    finally:
        async for key in redis.scan_iter(match=f"{prefix}*"):
            await redis.delete(key)
        await redis.aclose()
        await engine.close()
    return figures


def main() -> None:
    """Read the command line, measure, and print the milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="redis://127.0.0.1:6379/0", help="a Redis >= 7.0")
    parser.add_argument(
        "--workers", type=int, default=1000, help="announced and subscribed workers"
    )
    parser.add_argument("--times", type=int, default=300, help="how often each step is done")
    parser.add_argument("--rows", type=int, default=1100, help="noise rows of each job")
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--side", type=int, default=256, help="height and width of an image")
    print(json.dumps(asyncio.run(measured(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
