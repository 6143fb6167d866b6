"""Losses of a fleet whose parts are killed: `python -m benchmarks.reliability`.

Kills, stops and hangs real `vouchsafe worker` processes with nano's networks over a real
redis-server, while they work. Compares every job's votes, class by class, with those that this
process computes from the same key. Prints one JSON with a section for each scenario; `--only NAME`
runs one of them. Needs redis-server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from redis.asyncio import Redis

from benchmarks.fleet import (
    PIXELS,
    SHARD_ROWS,
    Fleet,
    default_model,
    ended,
    picture,
    question,
    ready,
    row_hashes,
    rows_of,
    until,
)
from benchmarks.server import serving
from models.noise import discrete_gaussian
from models.rows import Rows
from models.smoothing import SmoothedModel
from service.engine.redis.engine import PREFIX
from service.jobs import Domain

Args = tuple[int, ...]
CPU = torch.device("cpu")
JOB_ROWS = {"n0": 40, "n": 360}
RECORDING = (sys.executable, "-m", "benchmarks.recording_worker")
STALLING = (sys.executable, "-m", "benchmarks.stalling_worker")


async def kills(fleet: Fleet, count: int, jobs: int) -> dict[str, Any]:
    """`kill -9` of three workers repeatedly, each some seconds after it has begun to work."""
    chance = random.Random(0)
    await fleet.announce()
    await fleet.submit(jobs, **JOB_ROWS)
    killed = lost = 0

    async def live_and_die() -> None:
        nonlocal killed, lost
        worker = fleet.start()
        while killed < count:
            await until(partial(fleet.held, worker))
            await asyncio.sleep(chance.uniform(0, 6))
            if killed < count and (holds := await fleet.held(worker)):
                worker.process.kill()
                killed, lost = killed + 1, lost + holds
                worker = fleet.start()

    async def feed() -> None:
        while killed < count:
            if await fleet.open_jobs() < 3:
                await fleet.submit(2, **JOB_ROWS)
            await asyncio.sleep(0.5)

    await asyncio.gather(feed(), *(live_and_die() for _ in range(3)))
    return {"kills": killed, "leases lost": lost, **await fleet.verdict()}


async def twice(fleet: Fleet, rounds: int) -> dict[str, Any]:
    """Figures of shards delivered twice.

    A worker is stopped (SIGSTOP) past its lease, and another gets its shards. The first continues
    (SIGCONT) when the second has committed.
    """
    chance = random.Random(2)
    first, second = fleet.start(), fleet.start()
    await until(lambda: ready(first, second))
    late = 0
    for _ in range(rounds):
        second.process.send_signal(signal.SIGSTOP)
        (job,) = await fleet.submit(1, n0=16, n=496)
        await until(partial(fleet.held, first))
        await asyncio.sleep(chance.uniform(0, 0.2))
        first.process.send_signal(signal.SIGSTOP)
        late += await fleet.held(first)
        second.process.send_signal(signal.SIGCONT)
        await ended(fleet.engine, job)
        first.process.send_signal(signal.SIGCONT)
    second.process.send_signal(signal.SIGSTOP)
    (last,) = await fleet.submit(1, n0=0, n=8)  # The first computes it when it is done with those.
    await ended(fleet.engine, last)
    second.process.send_signal(signal.SIGCONT)
    return {
        "rounds": rounds,
        "shards delivered twice": late,
        "late commits refused": int(first.metric('vouchsafe_shards_total{outcome="refused"}')),
        **await fleet.verdict(),
    }


async def redis_kills(fleet: Fleet, count: int, jobs: int) -> dict[str, Any]:
    """`kill -9` of redis-server, started again on its append-only file, while two workers work."""
    chance = random.Random(1)
    workers = [fleet.start() for _ in range(2)]
    await until(lambda: ready(*workers))
    await fleet.submit(jobs, **JOB_ROWS)
    for _ in range(count):
        if not await fleet.open_jobs():
            await fleet.submit(2, **JOB_ROWS)
        await asyncio.sleep(chance.uniform(0.2, 1.5))
        fleet.server.kill()
        await asyncio.sleep(chance.uniform(0, 0.5))
        fleet.server.start()
    return {"kills of redis-server": count, **await fleet.verdict()}


async def poison(fleet: Fleet, jobs: int) -> dict[str, Any]:
    """A job whose rows no network accepts, among jobs that share its batches."""
    worker = fleet.start()
    await until(lambda: ready(worker))
    bad = question("poison", n0=0, n=SHARD_ROWS, shape=(1, 32, 32))
    await fleet.engine.submit(bad)
    await fleet.submit(jobs, **JOB_ROWS)
    status = await ended(fleet.engine, bad)
    async with Redis.from_url(fleet.server.url) as client:
        ((_, letter),) = await client.xrange(f"{PREFIX}dead")
    return {
        "poison job": status.state.value if status else "lost",
        "its failures": int(letter[b"failures"]),
        "its deaths": int(letter[b"deaths"]),
        "worker still runs": worker.process.poll() is None,
        **await fleet.verdict(),
    }


async def hung(fleet: Fleet) -> dict[str, Any]:
    """A worker whose device hangs in the middle of a batch, and one that goes on."""
    stall = fleet.folder / "stall"
    hanging = fleet.start(STALLING, stall=stall)
    await until(lambda: ready(hanging))
    stall.touch()
    await fleet.submit(1, **JOB_ROWS)
    await until(lambda: fleet.held(hanging))
    fleet.start()
    status = await asyncio.to_thread(hanging.ends)
    return {"exit status of the worker that hung": status, **await fleet.verdict()}


async def restarted(fleet: Fleet) -> dict[str, Any]:
    """`kill -9` of the API in the middle of a job; its client requests the result from the next
    API.
    """
    data = fleet.folder / "data"
    worker = fleet.start(data_dir=data)
    await until(lambda: ready(worker))
    redis = {"redis_url": fleet.server.url}
    request = {"files": {"image": picture(0)}, "data": {"n": "2000"}}
    async with httpx.AsyncClient() as client:
        with serving(data, settings=redis) as (url, api):
            worker.process.send_signal(signal.SIGSTOP)
            accepted = await client.post(
                f"{url}/predict", headers={"Prefer": "respond-async"}, **request
            )
            api.kill()
            worker.process.send_signal(signal.SIGCONT)
        job_id = accepted.json()["id"]
        if status := await fleet.engine.status(job_id):
            fleet.jobs.append(status.job)
            PIXELS[job_id] = question("as the API has it").pixels
        with serving(data, settings=redis) as (url, _):
            verdict = await fleet.verdict()
            found = (await client.get(f"{url}/jobs/{job_id}")).json()
    return {
        "the next API says": found["state"],
        "its answer is certified": found["result"]["certified"],
        **verdict,
    }


async def noise(fleet: Fleet, workers: int, jobs: int) -> dict[str, Any]:
    """Figures of `workers` workers that record the hash of every row of noise that they draw."""
    logs = [fleet.folder / f"noise-{at}" for at in range(workers)]
    started = [fleet.start(RECORDING, record=log) for log in logs]
    await until(lambda: ready(*started))
    await fleet.submit(jobs, **JOB_ROWS)
    verdict = await fleet.verdict()
    lines = [line.split() for log in logs for line in log.read_text().splitlines()]
    own = {
        (rows.key.hex(), row): digest
        for job in fleet.jobs
        for rows in (rows_of(job, domain) for domain in Domain)
        for row, digest in enumerate(_hashes(rows))
    }
    keys = {key for key, _ in own}  # Rows of a worker's warm-up are of no job.
    drawn = {(key, int(row)): digest for key, row, digest in lines if key in keys}
    return {
        "workers": workers,
        "workers that drew rows": sum(log.stat().st_size > 0 for log in logs),
        "rows": len(drawn),
        "rows drawn alike": len(drawn) - len(set(drawn.values())),
        "equal to one process' own": drawn == own,
        **verdict,
    }


def _hashes(rows: Rows) -> list[str]:
    """SHA-256 of each row's noise, drawn here."""
    shape = rows.pixels.shape
    drawn = discrete_gaussian(rows.key, rows.start, rows.stop, shape, rows.sigma, CPU)
    return row_hashes(drawn)


SCENARIOS: dict[str, tuple[Callable[..., Awaitable[dict[str, Any]]], Args, Args]] = {
    "workers killed": (kills, (100, 40), (1, 1)),
    "delivered twice": (twice, (12,), (1,)),
    "redis killed, everysec": (redis_kills, (10, 8), (1, 1)),
    "redis killed, always": (redis_kills, (10, 8), (1, 1)),
    "poison": (poison, (8,), (1,)),
    "hung device": (hung, (), ()),
    "API killed": (restarted, (), ()),
    "noise of 1 worker": (noise, (1, 4), (1, 1)),
    "noise of 2 workers": (noise, (2, 4), (2, 1)),
    "noise of 4 workers": (noise, (4, 4), (4, 1)),
}
"""Each scenario's function and arguments, in full and in its short form."""


EXPECTED: dict[str, Any] = {
    "jobs lost": 0,
    "jobs that failed": 0,
    "wrong tallies": 0,
    "poison job": "failed",
    "its failures": 3,
    "worker still runs": True,
    "exit status of the worker that hung": 1,
    "the next API says": "succeeded",
    "its answer is certified": True,
    "equal to one process' own": True,
    "rows drawn alike": 0,
}
"""Required values of figures, in any scenario."""


def faults(figures: dict[str, Any]) -> dict[str, Any]:
    """Those of the figures that are not as they must be."""
    return {k: v for k, v in figures.items() if k in EXPECTED and v != EXPECTED[k]}


async def run(name: str, folder: Path, model: SmoothedModel, *, short: bool) -> dict[str, Any]:
    """One scenario's figures, from separate processes."""
    began = time.monotonic()
    fsync = "always" if name.endswith("always") else "everysec"
    scenario, whole, some = SCENARIOS[name]
    async with Fleet(folder, model, fsync).running() as fleet:
        figures = await scenario(fleet, *(some if short else whole))
    return figures | {"seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    parser.add_argument("--short", action="store_true", help="as few kills as CI has time for")
    arguments = parser.parse_args()
    model, report = default_model(), {}
    for name in arguments.only or SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            report[name] = asyncio.run(run(name, Path(folder), model, short=arguments.short))
        print(json.dumps({name: report[name]}), flush=True)
    if wrong := {name: found for name in report if (found := faults(report[name]))}:
        raise SystemExit(f"not as it must be: {wrong}")


if __name__ == "__main__":
    main()
