"""A fleet asked for several times what it can do: nothing but answers and honest refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from redis.asyncio import Redis

from benchmarks.open_loop import ROWS, Load, ask, offered, summary
from benchmarks.redis_server import RedisServer, age
from models.bundle import DEFAULT_TASK, read_bundle
from service.config import Settings
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.jobs import Mode
from service.processes.api import create_api
from tests.support.serving import NUMERICS

KEYS = ("key-of-ann", "key-of-bob", "key-of-cyd")
CERTIFY = ROWS[Mode.CERTIFY]
BATCH_ROWS = 128
SERVED = read_bundle(DEFAULT_TASK).served_digest(NUMERICS)
RETENTION_SECONDS = 300
IDLE = {"workers", "announced", "announcement", "swept", "reconciled", "speed"}
"""What a fleet without work may hold in Redis, by the first part of a key's name."""


@dataclass
class PacedWorker:
    """A worker without a model that takes `seconds` for a batch, and a permit once it needs them.

    `batches` are the modes of the shards of each batch that it took.
    """

    engine: RedisEngine
    seconds: float = 0.0
    permits: asyncio.Semaphore | None = None
    busy: asyncio.Event = field(default_factory=asyncio.Event)
    batches: list[list[Mode]] = field(default_factory=list)

    async def run(self) -> None:
        labels = len(read_bundle(DEFAULT_TASK).labels)
        while True:
            leases = await self.engine.pull(
                Worker("paced", {"default": SERVED}, [NUMERICS]), BATCH_ROWS
            )
            if not leases:
                continue
            await self.engine.start(leases)
            self.batches.append([lease.job.mode for lease in leases])
            self.busy.set()
            if self.permits is not None:
                await self.permits.acquire()
            await asyncio.sleep(self.seconds)
            for lease in leases:
                assert await self.engine.commit(lease, [lease.shard.rows] + [0] * (labels - 1))


@asynccontextmanager
async def fleet(
    server: RedisServer, tmp_path: Path, backlog_rows: int, **paced: object
) -> AsyncIterator[tuple[httpx.AsyncClient, PacedWorker]]:
    """An API process's app over Redis with three keys, and one paced worker that it knows of."""
    settings = Settings.model_validate(
        {
            "redis_url": server.url,
            "data_dir": tmp_path / "data",
            "api_keys": ",".join(f"{key[-3:]}:{key}" for key in KEYS),
            "max_queue_rows": backlog_rows,
            "max_queue_rows_per_key": backlog_rows // 2,
            "retention_seconds": RETENTION_SECONDS,
        }
    )
    worker = PacedWorker(RedisEngine.from_settings(settings), **paced)  # type: ignore[arg-type]
    app = create_api(settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://service", timeout=90)
    async with app.router.lifespan_context(app), client:
        working = asyncio.create_task(worker.run())
        async with asyncio.timeout(60):
            while not (await worker.engine.capacity()).digests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        try:
            yield client, worker
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await worker.engine.close()


async def backlog_is(worker: PacedWorker, rows: int) -> None:
    async with asyncio.timeout(60):
        while (await worker.engine.capacity()).backlog_rows != rows:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def kinds_of_keys(redis: Redis) -> set[str]:
    return {key.decode()[len(PREFIX) :].split(":")[0] async for key in redis.scan_iter()}


async def test_overload_is_answered_or_refused_and_leaves_nothing(
    own_server: RedisServer, tmp_path: Path
) -> None:
    """Far past capacity there are answers in time, and 429 or 503 with Retry-After; then nothing
    is left in Redis of any of it."""
    speed = BATCH_ROWS / 0.03  # Rows a second at most, were there nothing but the worker's pace.
    load = Load(5 * speed, seconds=3, predict_share=0.5, wait_seconds=60, keys=KEYS)
    async with fleet(own_server, tmp_path, 4 * CERTIFY, seconds=0.03) as (client, worker):
        outcomes = await offered(client, load)
        told = summary(outcomes, load.wait_seconds)
        assert set(told["by status"]) == {200, 429, 503}, told
        refused = [each for each in outcomes if each.status != 200]
        assert all(each.retry_after is not None and each.retry_after >= 1 for each in refused)
        assert told["refusals without Retry-After"] == 0
        assert told["admitted"] + len(refused) == len(outcomes)
        assert {each.mode for each in outcomes if each.status == 200} == {
            Mode.CERTIFY,
            Mode.PREDICT,
        }
        assert (await worker.engine.capacity()).backlog_rows == 0
        async with connect(own_server.url) as redis:
            kinds = await kinds_of_keys(redis)
            assert "job" in kinds
            assert "image" not in kinds
            assert await redis.hgetall(f"{PREFIX}backlog") == {b"all": b"0"}
            await age(redis, PREFIX, (RETENTION_SECONDS + 61) * 1000)
            assert await kinds_of_keys(redis) <= IDLE


async def test_predict_overtakes_a_full_backlog(own_server: RedisServer, tmp_path: Path) -> None:
    """PREDICT asked behind certifications that fill the backlog is computed after the batch in
    hand, while one more certification is refused."""
    permits, rows = asyncio.Semaphore(0), 2 * (CERTIFY + ROWS[Mode.PREDICT])
    async with fleet(own_server, tmp_path, rows, permits=permits) as (client, worker):
        asking = [asyncio.create_task(ask(client, Mode.CERTIFY, 60, key)) for key in KEYS[:2]]
        await backlog_is(worker, 2 * CERTIFY)
        async with asyncio.timeout(60):
            await worker.busy.wait()
        refused = await ask(client, Mode.CERTIFY, 60, KEYS[2])
        assert refused.status == 503
        assert (refused.retry_after or 0) >= 1
        quick = asyncio.create_task(ask(client, Mode.PREDICT, 60, KEYS[2]))
        await backlog_is(worker, 2 * CERTIFY + ROWS[Mode.PREDICT])
        permits.release()
        permits.release()
        assert (await quick).status == 200
        assert not any(task.done() for task in asking)
        assert set(worker.batches[0]) == {Mode.CERTIFY}
        assert worker.batches[1][:2] == [Mode.PREDICT] * 2
        worker.permits = None
        permits.release()
        assert [outcome.status for outcome in await asyncio.gather(*asking)] == [200, 200]


async def test_a_quota_is_a_keys_own(own_server: RedisServer, tmp_path: Path) -> None:
    """A key with half the backlog in its name is refused with 429, while another is let in."""
    permits = asyncio.Semaphore(0)
    async with fleet(own_server, tmp_path, 4 * CERTIFY, permits=permits) as (client, worker):
        asking = [asyncio.create_task(ask(client, Mode.CERTIFY, 60, KEYS[0])) for _ in range(2)]
        await backlog_is(worker, 2 * CERTIFY)
        refused = await ask(client, Mode.PREDICT, 60, KEYS[0])
        assert refused.status == 429
        assert (refused.retry_after or 0) >= 1
        asking.append(asyncio.create_task(ask(client, Mode.CERTIFY, 60, KEYS[1])))
        await backlog_is(worker, 3 * CERTIFY)
        worker.permits = None
        permits.release()
        assert [outcome.status for outcome in await asyncio.gather(*asking)] == [200, 200, 200]
