"""Cost of Redis between API and workers: `python -m benchmarks.fleet_rows`.

Requests the same certifications, by turns, of the engine in this process, of a worker process on
all cores, and of two on half the cores each. Both fleets have their own Redis. All processes are up
the whole time, so idle ones are in every figure. Prints one JSON: rows/s, the loss against the
engine in process, processor time by process, rows per batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY

from benchmarks.processes import Running, redis_server, worker_process
from models.bundle import DEFAULT_TASK, read_bundle
from service.cli.bench.speed import SELECTION_ROWS, ask_desk, driven, percentiles, png
from service.config import Settings
from service.engine.redis.engine import RedisEngine
from service.predictions.service import Predictions
from service.processes.embedded import Embedded
from service.secrets import load_secret
from service.signing import SigningKeys

IN_PROCESS = "in process"
METRICS = {
    "batch seconds": "vouchsafe_batch_duration_seconds_sum",
    "batches": "vouchsafe_batches_total",
    "rows": "vouchsafe_rows_total",
    "padding": "vouchsafe_padding_rows_total",
}


class Way:
    """One deployment: the use case, and the processes behind it."""

    def __init__(
        self,
        predictions: Predictions,
        workers: Sequence[Running] = (),
        redis: Running | None = None,
    ) -> None:
        self.predictions = predictions
        self._workers = workers
        self._redis = redis

    async def used(self) -> dict[str, float]:
        """Seconds of processor time by process, and the workers' metrics, all so far."""
        used = {"asking": time.process_time()}
        if self._redis is not None:
            used["Redis"] = self._redis.cpu_seconds()
            used["workers"] = sum(worker.cpu_seconds() for worker in self._workers)
        for name, metric in METRICS.items():
            read = [partial(worker.metric, metric) for worker in self._workers]
            here: list[Callable[[], float]] = [partial(_own_metric, metric)]
            used[name] = sum([await asyncio.to_thread(each) for each in read or here])
        return used

    async def measured(self, n: int, images: Sequence[bytes], concurrency: int) -> dict[str, float]:
        """Figures of certifying the images, `concurrency` at once."""
        before, began = await self.used(), time.perf_counter()
        taken = await driven(partial(ask_desk, self.predictions, n), images, concurrency)
        seconds = time.perf_counter() - began
        after = await self.used()
        used = {name: after[name] - value for name, value in before.items()}
        thousands = len(images) * (SELECTION_ROWS + n) / 1000
        cpu = {name: used[name] for name in ("asking", "Redis", "workers") if name in used}
        return {
            "rows/s": 1000 * thousands / seconds,
            "latency, p50, s": percentiles(taken)["p50"],
            **{f"CPU of {name}, s": value / thousands for name, value in cpu.items()},
            "CPU of all, s": sum(cpu.values()) / thousands,
            "rows a batch": used["rows"] / used["batches"],
            "padding, share": used["padding"] / (used["rows"] + used["padding"]),
            "between batches, share of the time": 1
            - used["batch seconds"] / (seconds * max(1, len(self._workers))),
        }


def _own_metric(name: str) -> float:
    """The sum of a metric's samples in this process."""
    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == name
    )


@asynccontextmanager
async def in_process(settings: Settings) -> AsyncIterator[Way]:
    """The engine, the worker and the networks here, ready."""
    embedded = Embedded(settings)
    stop = asyncio.Event()
    working = asyncio.create_task(embedded.worker(on_failure=stop.set)(stop))
    predictions = Predictions(
        settings, embedded.engine, embedded.tasks, embedded.secret, embedded.keys
    )
    try:
        await embedded.ready()
        yield Way(predictions)
    finally:
        stop.set()
        await asyncio.gather(working, return_exceptions=True)
        await predictions.close()


@asynccontextmanager
async def through_redis(
    folder: Path, runtime: str, cores: Sequence[Sequence[int]]
) -> AsyncIterator[Way]:
    """A Redis with a worker process for each set of cores, ready."""
    folder.mkdir()  # noqa: ASYNC240 - before anything runs.
    async with AsyncExitStack() as fleet:
        log = fleet.enter_context((folder / "log").open("wb"))
        server = fleet.enter_context(redis_server(folder / "redis"))
        workers = [
            fleet.enter_context(
                worker_process(folder / f"worker{at}", server.url, own, log=log, runtime=runtime)
            )
            for at, own in enumerate(cores)
        ]
        settings = Settings.model_validate(
            {"data_dir": folder / "api", "redis_url": server.url, "max_queue_rows": 10**7}
        )
        engine = RedisEngine.from_settings(settings)
        fleet.push_async_callback(engine.close)
        tasks = {"default": read_bundle(DEFAULT_TASK)}
        secret = load_secret(settings.data_dir)
        keys = SigningKeys.from_settings(settings, secret)
        predictions = Predictions(settings, engine, tasks, secret, keys)
        fleet.push_async_callback(predictions.close)
        yield Way(predictions, workers, server)


async def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The rounds' medians, and the cost against the engine in process."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    settings = Settings.model_validate(
        {"data_dir": folder / "own", "runtime": options.runtime, "max_queue_rows": 10**7}
    )
    images = [png(seed, read_bundle(DEFAULT_TASK).resolution) for seed in range(options.requests)]
    rounds: dict[str, list[dict[str, float]]] = {}
    load = []
    async with AsyncExitStack() as stack:
        one = through_redis(folder / "one", options.runtime, [cores])
        two = through_redis(folder / "two", options.runtime, [cores[:half], cores[half:]])
        ways = {
            IN_PROCESS: await stack.enter_async_context(in_process(settings)),
            "1 worker": await stack.enter_async_context(one),
            "2 workers": await stack.enter_async_context(two),
        }
        for way in ways.values():
            await way.measured(options.n, images[:1], 1)
        names = list(ways)
        for number in range(options.rounds):
            for name in names[number % 3 :] + names[: number % 3]:
                figures = await ways[name].measured(options.n, images, options.concurrency)
                rounds.setdefault(name, []).append(figures)
                print(
                    f"round {number + 1}, {name}: {figures['rows/s']:.0f} rows/s", file=sys.stderr
                )
                load.append(os.getloadavg()[0])
    return {
        "runtime": options.runtime,
        "cores": len(cores),
        "n": options.n,
        "requests a round": options.requests,
        "at once": options.concurrency,
        "rounds": options.rounds,
        "load, median": round(float(np.median(load)), 2),
        **{name: _medians(each) for name, each in rounds.items()},
        "lost against in process": {
            name: _lost(rounds[IN_PROCESS], rounds[name]) for name in names[1:]
        },
    }


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    medians = {name: float(np.median([each[name] for each in rounds])) for name in rounds[0]}
    best = max(each["rows/s"] for each in rounds)
    return {name: round(value, 4) for name, value in {"rows/s, best": best, **medians}.items()}


def _lost(
    here: Sequence[Mapping[str, float]], there: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Shares of rows/s lost: each round's own pair, and the best of either."""
    pairs = [1 - b["rows/s"] / a["rows/s"] for a, b in zip(here, there, strict=True)]
    best = 1 - max(b["rows/s"] for b in there) / max(a["rows/s"] for a in here)
    return {
        "rounds, median": round(float(np.median(pairs)), 4),
        "rounds, least": round(min(pairs), 4),
        "rounds, most": round(max(pairs), 4),
        "best of either": round(best, 4),
    }


def main() -> None:
    """Read the command line, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", default="torch", choices=["torch", "openvino"])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=8, help="of each way in each round")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            figures = asyncio.run(measured(options, Path(folder)))
        except Exception:
            for log in Path(folder).glob("*/log"):
                print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
            raise
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
