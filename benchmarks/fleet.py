"""Worker processes of a fleet, an engine that sends them jobs, and their expected votes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
from PIL import Image
from redis.asyncio import Redis
from redis.exceptions import RedisError
from torch import Tensor

from benchmarks.redis_server import GROUP, RedisServer, written
from benchmarks.server import free_port
from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice
from models.rows import Rows
from models.runtime import Torch
from models.smoothing import SmoothedModel, load, numerics, votes
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.jobs import Domain, Job, JobStatus, Mode, State, noise_key

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
SECRET = b"s" * 32
VOUCHSAFE = (str(Path(sys.executable).with_name("vouchsafe")), "worker")
BUNDLE = read_bundle(DEFAULT_TASK)
NUMERICS = numerics(Torch())[0].described()
SERVED = BUNDLE.served_digest(NUMERICS)
"""The digest that a worker on this machine serves the default task under."""
SHARD_ROWS = 8
LEASE_SECONDS = 4.0
"""A fleet's lease: as short as a busy machine allows, because crashes are noticed that late."""
PIXELS: dict[str, bytes] = {}
"""Pixels by job: an engine deletes them when a job ends."""
LONG = 600.0
"""Seconds of a lease that does not run out while a test lasts."""


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A `vouchsafe worker` with its probes on `url`; `log` is the file of its output."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def ready(self) -> bool:
        return self.probe("/readyz").get("status") == "ok"

    def probe(self, path: str) -> dict[str, Any]:
        """A probe's response; empty where the process does not listen."""
        try:
            found: dict[str, Any] = httpx.get(self.url + path, timeout=10).json()
        except httpx.TransportError:
            return {}
        return found

    def metric(self, name: str) -> float:
        """A sample of the process's metrics, labels and all, or 0."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def ends(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(120)

    def until(self, holds: Callable[[], object], seconds: float = 120) -> None:
        """Returns once the condition holds; raises where the process or the time ends first."""
        deadline = time.monotonic() + seconds
        while not holds():
            if self.process.poll() is not None:
                raise RuntimeError(f"the worker has ended: {self.said()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the worker's log: {self.said()}")
            time.sleep(0.05)


@contextmanager
def worker_process(
    folder: Path,
    redis_url: str | None,
    command: Sequence[str] = VOUCHSAFE,
    cwd: Path = ROOT,
    **settings: object,
) -> Iterator[RunningWorker]:
    """A worker that is just started, its data and its log in `folder`; killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "worker.log"
    chosen: Mapping[str, object] = {
        "data_dir": folder / "data",
        "redis_url": redis_url,
        "runtime": Torch.name,
        **settings,
    }
    environment = {n: v for n, v in os.environ.items() if not n.startswith("VOUCHSAFE_")}
    environment |= {
        f"VOUCHSAFE_{name.upper()}": str(value)
        for name, value in chosen.items()
        if value is not None
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603
            [*command, "--port", str(port)],
            env=environment,
            cwd=cwd,
            stdout=stream,
            stderr=stream,
        )
    try:
        yield RunningWorker(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait()


def engine_at(url: str, shard_rows: int = 64, lease_seconds: float = LONG) -> RedisEngine:
    """An engine as an API process has it, for `engine.close()` at the end."""
    options = EngineOptions(shard_rows=shard_rows, lease_seconds=lease_seconds)
    return RedisEngine(connect(url), options, poll_seconds=0.2)


def picture(index: int) -> bytes:
    """A picture of the slice as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(evaluation_slice(SLICE).images[index]).save(stream, "PNG")
    return stream.getvalue()


def question(
    name: str,
    *,
    index: int = 0,
    n: int = 60,
    n0: int = 20,
    task: str = "default",
    bundle: str = SERVED,
    shape: tuple[int, int, int] = (3, 32, 32),
) -> Job:
    """A job of the default task's labels about a picture of the slice, keyed as the API keys it.

    A smaller `shape` takes the picture's first bytes, which no network of the task can take.
    """
    image = evaluation_slice(SLICE).images[index].transpose(2, 0, 1)
    pixels = PIXELS[name] = image.astype(np.uint8).tobytes()[: math.prod(shape)]
    job = Job(
        id=name,
        task=task,
        task_digest=BUNDLE.digest,
        bundle=bundle,
        mode=Mode.CERTIFY,
        sigma=0.25,
        alpha=0.001,
        n0=n0,
        n=n,
        classes=10,
        shape=shape,
        pixels=pixels,
        key=b"",
        created=time.time(),
    )
    return replace(job, key=noise_key(SECRET, job))


def default_model(bundle: Bundle | None = None) -> SmoothedModel:
    """The networks by themselves, without engine or worker."""
    return load(bundle or BUNDLE)


def rows_of(job: Job, domain: Domain) -> Rows:
    """All rows of a domain of the job, as input of the networks."""
    pixels = np.frombuffer(job.pixels or PIXELS[job.id], np.uint8).reshape(job.shape)
    rows = job.n0 if domain is Domain.SELECTION else job.n
    return Rows(pixels, job.domain_key(domain), 0, rows, job.sigma)


def counted_exactly(status: JobStatus, model: SmoothedModel) -> bool:
    """Whether the job has succeeded with the votes of each of its rows, counted once."""
    job = status.job
    counts = {Domain.SELECTION: status.selection, Domain.ESTIMATION: status.estimation}
    return (
        status.state is State.SUCCEEDED
        and status.rows_done == job.rows
        and all(tuple(votes(model, rows_of(job, d)).tolist()) == counts[d] for d in counts)
    )


def row_hashes(noise: Tensor) -> list[str]:
    """SHA-256 of each row's noise (B,3,H,W)."""
    return [hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest() for row in noise.cpu()]


class Fleet:
    """One redis-server, an engine as an API process has it, and a changing set of workers."""

    def __init__(self, folder: Path, model: SmoothedModel, fsync: str = "everysec") -> None:
        self.folder = folder
        self.model = model
        self.server = RedisServer(folder, fsync)
        self.engine: RedisEngine
        self.jobs: list[Job] = []
        self._processes = AsyncExitStack()
        self._started = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        """Start everything, and stop it at the end."""
        self.server.start()
        self.engine = engine_at(self.server.url, shard_rows=SHARD_ROWS, lease_seconds=LEASE_SECONDS)
        try:
            async with self._processes:
                yield self
        finally:
            await self.engine.close()
            self.server.kill()

    def start(self, command: Sequence[str] = VOUCHSAFE, **settings: object) -> RunningWorker:
        """One more worker, just started."""
        chosen = {"lease_seconds": LEASE_SECONDS, "run_adaptation_jobs": False, **settings}
        self._started += 1
        place = self.folder / f"worker-{self._started}"
        process = worker_process(place, self.server.url, command, **chosen)  # type: ignore[arg-type]
        return self._processes.enter_context(process)

    async def submit(self, count: int, **rows: int) -> list[Job]:
        """`count` queued jobs about different pictures."""
        first = len(self.jobs)
        new = [question(f"job-{at}", index=at % 500, **rows) for at in range(first, first + count)]
        for job in new:
            await persist(partial(self.engine.submit, job))
        async with Redis.from_url(self.server.url) as client:
            await written(client)
        self.jobs += new
        return new

    async def announce(self) -> None:
        """Have jobs accepted before there is a worker."""
        await self.engine.pull(Worker("announcing", {"default": SERVED}, [NUMERICS]), 1)

    async def held(self, worker: RunningWorker) -> int:
        """Number of shards that the worker leases."""
        async with Redis.from_url(self.server.url) as client:
            found = 0
            async for stream in client.scan_iter(match=f"{PREFIX}lane:*"):
                for consumer in await client.xinfo_consumers(stream, GROUP):
                    if f"-{worker.process.pid}-".encode() in consumer["name"]:
                        found += consumer["pending"]
            return found

    async def open_jobs(self) -> int:
        """Jobs that have not ended."""
        statuses = [await persist(partial(self.engine.status, job.id)) for job in self.jobs]
        return sum(status is not None and not status.state.ended for status in statuses)

    async def verdict(self) -> dict[str, Any]:
        """The jobs' outcomes, with their votes compared with this process's own."""
        statuses = [await ended(self.engine, job) for job in self.jobs]
        done = [status for status in statuses if status and status.state is State.SUCCEEDED]
        async with Redis.from_url(self.server.url) as client:
            letters = [fields for _, fields in await client.xrange(f"{PREFIX}dead")]
        return {
            "jobs": len(statuses),
            "shards": sum(len(job.shards(SHARD_ROWS)) for job in self.jobs),
            "rows": sum(job.rows for job in self.jobs),
            "jobs lost": statuses.count(None),
            "jobs that failed": len(statuses) - statuses.count(None) - len(done),
            "dead letters": [
                {name.decode(): fields[name].decode() for name in (b"failures", b"deaths")}
                for fields in letters
            ],
            "wrong tallies": sum(not counted_exactly(status, self.model) for status in done),
        }


async def ended(engine: RedisEngine, job: Job) -> JobStatus | None:
    """The job's last status, through any outage of Redis; None for a job that is gone."""

    async def last() -> JobStatus | None:
        statuses = [status async for status in engine.watch(job.id)]
        return statuses[-1] if statuses else None

    return await persist(last)


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """What the call returns once Redis answers."""
    while True:
        try:
            return await call()
        except RedisError:
            await asyncio.sleep(0.1)


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    """Returns once the condition holds; raises TimeoutError after five minutes."""
    async with asyncio.timeout(300):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in other processes.
            await asyncio.sleep(0.05)


async def ready(*workers: RunningWorker) -> bool:
    """Whether all workers report that they are ready."""
    return all([await asyncio.to_thread(worker.ready) for worker in workers])
