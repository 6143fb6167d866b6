"""Overload of a fleet by several times its capacity: `python -m benchmarks.overload`.

Starts Redis, an API process and a worker of the default task. Measures the capacity by a closed
loop, then the rows left when a caller disconnects. Chooses a backlog that fits the deadline. Then
sends `--times` the capacity in an open loop, PREDICT and CERTIFY mixed, with several keys, and
waits until all jobs have expired. Prints one JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis

from benchmarks.open_loop import IMAGE, ROWS, Load, ask, offered, summary
from benchmarks.processes import Running, api_process, redis_server, worker_process
from service.cli.bench.speed import SIGMA, driven
from service.engine.options import EngineOptions
from service.engine.redis.client import connect
from service.engine.redis.engine import RedisEngine
from service.jobs import Mode

CALLERS = 2
"""Requests at once while the capacity is measured."""
LONG_ROWS = 20_000
WAIT_SECONDS = 600
IDLE_KEYS = 10
"""The fleet's own keys in Redis; a job has at least one."""
ROWS_COMPUTED = "vouchsafe_rows_total"
RETENTION_SECONDS = 120
SAFETY = 1 / 3
"""The share of the work done within the deadline that may be queued.

PREDICT overtakes the rest, and other work of the machines slows them.
"""


async def capacity(client: httpx.AsyncClient, key: str, questions: int) -> float:
    """Rows per second of certifications, CALLERS at once, none rejected."""

    async def certified(_: bytes) -> None:
        outcome = await ask(client, Mode.CERTIFY, WAIT_SECONDS, key)
        if outcome.status != 200:
            raise RuntimeError(f"the capacity cannot be measured: status {outcome.status}")

    await driven(certified, [b""] * CALLERS, CALLERS)
    began = time.perf_counter()
    await driven(certified, [b""] * questions, CALLERS)
    return questions * ROWS[Mode.CERTIFY] / (time.perf_counter() - began)


async def hung_up(
    client: httpx.AsyncClient, engine: RedisEngine, worker: Running, key: str
) -> dict[str, Any]:
    """Figures of a long request whose caller disconnects once it runs."""
    before = await _metric(worker, ROWS_COMPUTED)
    fields = {"n": str(LONG_ROWS), "sigma": str(SIGMA)}
    headers = {"Authorization": f"Bearer {key}"}
    asking = asyncio.create_task(
        client.post("/predict", files={"image": IMAGE}, data=fields, headers=headers)
    )
    while await _metric(worker, ROWS_COMPUTED) == before:  # noqa: ASYNC110 - in another process.
        await asyncio.sleep(0.05)
    asking.cancel()
    began = time.perf_counter()
    while (await engine.capacity()).backlog_rows:  # noqa: ASYNC110 - the work is elsewhere.
        await asyncio.sleep(0.01)
    freed = time.perf_counter() - began
    at = await _metric(worker, ROWS_COMPUTED)
    await asyncio.sleep(3)  # Many batches, were there any.
    batches = await _metric(worker, "vouchsafe_batches_total")
    return {
        "rows asked": LONG_ROWS,
        "seconds until none of them waits": round(freed, 3),
        "rows computed after that": round(await _metric(worker, ROWS_COMPUTED) - at),
        "rows of a batch": round(await _metric(worker, ROWS_COMPUTED) / batches),
    }


async def _metric(worker: Running, name: str) -> float:
    return await asyncio.to_thread(worker.metric, name)


class Watch:
    """Memory, keys and queues of the processes and Redis, sampled once a second, by phase."""

    def __init__(self, api: Running, worker: Running, redis: Redis, engine: RedisEngine) -> None:
        self._api = api
        self._worker = worker
        self._redis = redis
        self._engine = engine
        self._seen: dict[str, list[dict[str, float]]] = {}

    async def look(self, phase: str) -> dict[str, float]:
        """The current sample, stored under the phase."""
        memory = await self._redis.info("memory")
        streams = [key async for key in self._redis.scan_iter(match="{vouchsafe}:lane:*")]
        now = {
            "API, MiB": self._api.resident_mib(),
            "worker, MiB": self._worker.resident_mib(),
            "Redis, MiB": round(memory["used_memory"] / 2**20, 2),
            "keys": await self._redis.dbsize(),
            "shards in streams": sum([await self._redis.xlen(stream) for stream in streams]),
            "backlog rows": (await self._engine.capacity()).backlog_rows,
        }
        self._seen.setdefault(phase, []).append(now)
        return now

    async def during(self, phases: Sequence[str], seconds: float) -> None:
        """Sample until cancelled; the phases share the seconds evenly, the last has the rest."""
        began = time.perf_counter()
        while True:
            part = int((time.perf_counter() - began) / seconds * len(phases))
            await self.look(phases[min(part, len(phases) - 1)])
            await asyncio.sleep(1)

    def most(self) -> dict[str, dict[str, float]]:
        """The largest of each figure, by phase."""
        return {
            phase: {name: max(each[name] for each in seen) for name in seen[0]}
            for phase, seen in self._seen.items()
        }


async def expired(watch: Watch) -> float:
    """Seconds until no job is stored; raises TimeoutError where one stays."""
    began = time.perf_counter()
    async with asyncio.timeout(3 * RETENTION_SECONDS + 60):
        while (await watch.look("while it expires"))["keys"] > IDLE_KEYS:  # noqa: ASYNC110
            await asyncio.sleep(1)
    await watch.look("after")
    return time.perf_counter() - began


async def overloaded(
    api: Running, worker: Running, redis: Redis, engine: RedisEngine, load: Load
) -> dict[str, Any]:
    """Figures of the open loop, and samples before, in and after it."""
    watch = Watch(api, worker, redis, engine)
    before = await watch.look("before")
    async with _client(api) as client:
        thirds = ["first third", "second third", "last third"]
        watching = asyncio.create_task(watch.during(thirds, load.seconds))
        began, used = time.perf_counter(), api.cpu_seconds()
        outcomes = await offered(client, load)
        seconds, used = time.perf_counter() - began, api.cpu_seconds() - used
        watching.cancel()
    figures = summary(outcomes, load.wait_seconds)
    return {
        "asked, rows/s": round(load.rows_per_second, 1),
        "asked, questions/s": round(load.questions_per_second, 2),
        "answered, rows/s": round(figures["rows answered"] / seconds, 1),
        **figures,
        "CPU of the API, ms a question": round(1000 * used / len(outcomes), 1),
        "keys before": before["keys"],
        "seconds until nothing is kept": round(await expired(watch), 1),
        "at most held": watch.most(),
    }


def _client(api: Running) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=api.url, timeout=WAIT_SECONDS, limits=limits)


async def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    keys = [f"key-of-caller-{number}" for number in range(options.keys)]
    settings: dict[str, object] = {
        "api_keys": ",".join(f"caller{number}:{key}" for number, key in enumerate(keys)),
        "retention_seconds": RETENTION_SECONDS,
    }
    with ExitStack() as fleet:
        log = fleet.enter_context((folder / "log").open("wb"))
        server = fleet.enter_context(redis_server(folder / "redis"))
        runtime = {"runtime": options.runtime, "retention_seconds": RETENTION_SECONDS}
        worker = fleet.enter_context(
            worker_process(folder / "worker", server.url, log=log, **runtime)
        )
        redis = connect(server.url)
        engine = RedisEngine(
            redis, EngineOptions(shard_rows=64, retention_seconds=RETENTION_SECONDS)
        )
        data = folder / "api"
        with api_process(data, server.url, log, **settings) as api:
            async with _client(api) as client:
                speed = await capacity(client, keys[0], options.questions)
                left = await hung_up(client, engine, worker, keys[0])
        backlog_rows = int(SAFETY * speed * options.wait)
        if backlog_rows < 2 * ROWS[Mode.CERTIFY]:
            raise ValueError(
                f"wait = {options.wait} s: at {speed:.0f} rows/s a backlog done in time has "
                f"{backlog_rows} rows, too few for two certifications of {ROWS[Mode.CERTIFY]}"
            )
        settings["max_queue_rows"] = backlog_rows
        settings["max_queue_rows_per_key"] = max(backlog_rows // 2, ROWS[Mode.CERTIFY])
        rate = options.times * speed
        load = Load(rate, options.seconds, options.predict_share, options.wait, keys)
        with api_process(data, server.url, log, **settings) as api:
            figures = await overloaded(api, worker, redis, engine, load)
        await engine.close()
    return {
        "machine": {"cores": os.cpu_count(), "load": [round(each, 2) for each in os.getloadavg()]},
        "runtime": options.runtime,
        "capacity, rows/s": round(speed, 1),
        "a caller hangs up": left,
        "backlog_rows": backlog_rows,
        "max_queue_rows_per_key": settings["max_queue_rows_per_key"],
        "keys": options.keys,
        "PREDICT, share of questions": options.predict_share,
        **figures,
    }


def main() -> None:
    """Read the command line, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=float, default=5.0, help="the offered load in capacities")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the load")
    parser.add_argument("--wait", type=int, default=20, help="the deadline of every question, s")
    parser.add_argument("--predict-share", type=float, default=0.5, help="of the questions")
    parser.add_argument("--keys", type=int, default=4, help="callers, each with a key")
    parser.add_argument("--questions", type=int, default=12, help="from which capacity is measured")
    parser.add_argument("--runtime", default="torch", choices=["torch", "openvino"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            figures = asyncio.run(_measured(options, Path(folder)))
        except Exception:
            print((Path(folder) / "log").read_text(errors="replace")[-2000:], file=sys.stderr)
            raise
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
