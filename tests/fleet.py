"""Worker processes of a fleet, and an engine that asks them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.server import free_port
from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from models.evaluation.datasets import evaluation_slice
from models.runtime import Torch
from models.smoothing import Rows, SmoothedModel, load, numerics, votes
from service.engine_redis.client import connect
from service.engine_redis.engine import RedisEngine
from service.jobs import Domain, Job, JobStatus, Mode, State, noise_key

ROOT = Path(__file__).parents[1]
SLICE = ROOT / "tests" / "data" / "cifar10-slice.png"
SECRET = b"s" * 32
VOUCHSAFE = (str(Path(sys.executable).with_name("vouchsafe")), "worker")
SERVED = read_bundle(DEFAULT_TASK).served_digest(numerics(Torch())[0].described())
"""The digest that a worker on this machine serves the default task under."""
LONG = 600.0
"""Seconds of a lease that does not run out while a test lasts."""


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """`vouchsafe worker` with its probes on `url`; `log` is where all that it says goes."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def ready(self) -> bool:
        return self.probe("/readyz").get("status") == "ok"

    def probe(self, path: str) -> dict[str, Any]:
        """What a probe answers; empty where nobody listens."""
        try:
            told: dict[str, Any] = httpx.get(self.url + path, timeout=10).json()
        except httpx.TransportError:
            return {}
        return told

    def metric(self, name: str) -> float:
        """A sample of the process's metrics, labels and all, or 0."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def ends(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(120)

    def until(self, holds: Callable[[], object], seconds: float = 120) -> None:
        """Returns once the condition holds; fails where the process ends or time passes first."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)


@contextmanager
def worker_process(
    folder: Path,
    redis_url: str | None,
    command: Sequence[str] = VOUCHSAFE,
    cwd: Path = ROOT,
    **settings: object,
) -> Iterator[WorkerProcess]:
    """A worker that is just started, its data and its log in `folder`; killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "worker.log"
    chosen: Mapping[str, object] = {"data_dir": folder / "data", "redis_url": redis_url, **settings}
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
        yield WorkerProcess(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait()


def engine_at(url: str, **options: Any) -> RedisEngine:
    """An engine as an API process has it, for `engine.close()` at the end."""
    chosen = {"shard_rows": 64, "lease_seconds": LONG, "poll_seconds": 0.2} | options
    return RedisEngine(connect(url), **chosen)


def question(
    name: str,
    *,
    index: int = 0,
    n: int = 60,
    n0: int = 20,
    task: str = "default",
    bundle: str = SERVED,
) -> Job:
    """A job of the default task's labels about a picture of the slice, keyed as the API keys it."""
    image = np.ascontiguousarray(evaluation_slice(SLICE).images[index].transpose(2, 0, 1))
    shape, pixels = (3, 32, 32), image.astype(np.uint8).tobytes()
    return Job(
        id=name,
        task=task,
        bundle=bundle,
        mode=Mode.CERTIFY,
        sigma=0.25,
        alpha=0.001,
        n0=n0,
        n=n,
        classes=10,
        shape=shape,
        pixels=pixels,
        key=noise_key(SECRET, pixels, shape, bundle, 0.25),
        created=time.time(),
    )


async def last_status(engine: Any, job_id: str) -> JobStatus:
    """How a job ends."""
    *_, last = [status async for status in engine.watch(job_id)]
    assert isinstance(last, JobStatus)
    return last


async def rows_done(engine: RedisEngine, job_id: str) -> int:
    status = await engine.status(job_id)
    assert status is not None
    return status.rows_done


def default_model(bundle: Bundle | None = None) -> SmoothedModel:
    """The networks by themselves, without engine or worker."""
    return load(bundle or read_bundle(DEFAULT_TASK))


def assert_counted_exactly(status: JobStatus, model: SmoothedModel) -> None:
    """The job's votes are those of each of its rows, counted once."""
    job = status.job
    assert (status.state, status.rows_done) == (State.SUCCEEDED, job.rows)
    pixels = np.frombuffer(job.pixels, np.uint8).reshape(job.shape)
    for domain, rows, told in (
        (Domain.SELECTION, job.n0, status.selection),
        (Domain.ESTIMATION, job.n, status.estimation),
    ):
        asked = Rows(pixels, job.domain_key(domain), 0, rows, job.sigma)
        assert told == tuple(votes(model, asked).tolist())
