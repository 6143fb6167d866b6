"""Speed of the default task in one process: a plain loop, the engine, the service over HTTP."""

from __future__ import annotations

import asyncio
import inspect
import io
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models.bundle import DEFAULT_TASK, read_bundle
from models.noise import discrete_gaussian
from models.rows import Rows
from models.runtime import Network, Runtime
from models.smoothing import tried_runtime, votes
from service.api.app import create_app
from service.cli.bench.plain_loop import loaded, plain_loop
from service.config import Settings
from service.operations.server import DrainingServer
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from service.processes.embedded import Embedded, leave_if_hung

CONCURRENCIES = (1, 4, 16)
SIGMA = 0.25
NOISE_KEY = b"benchmark/noise/" * 2
SELECTION_ROWS = 100
LONGER = 10
"""Factor on the rows of the second question whose peak memory is measured."""

WAIT_SECONDS = 600

Ask = Callable[[bytes], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Plan:
    """Load of a benchmark: `requests` questions of 100 + `n` rows to the engine and over HTTP.

    Each way is measured beside the loops, in `rounds` rounds.
    """

    n: int = 1000
    requests: int = 16
    rounds: int = 1


class _Watched:
    """A runtime that sums the seconds spent inside networks."""

    def __init__(self, runtime: Runtime) -> None:
        self.name = runtime.name
        self.seconds = 0.0
        self._runtime = runtime
        self._adding = threading.Lock()

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        return self._runtime.weights_dtype(device, dtype)

    def prepare(self, network: nn.Module) -> Network:
        prepared = self._runtime.prepare(network)

        def watched(*inputs: Tensor) -> Tensor:
            began = time.perf_counter()
            output = prepared(*inputs)
            if output.is_cuda:
                torch.cuda.synchronize()
            with self._adding:
                self.seconds += time.perf_counter() - began
            return output

        return watched


def bench(plan: Plan, runtime: str) -> dict[str, Any]:
    """The figures of the report, and the source of the plain loop."""
    cores = torch.get_num_threads()
    watched = _Watched(tried_runtime(runtime, read_bundle(DEFAULT_TASK)))
    rows = plan.requests * (SELECTION_ROWS + plan.n)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data_dir=Path(folder), api_keys=(), api_keys_file=None, max_queue_rows=rows
        )
        embedded = Embedded(settings, watched)
        figures = asyncio.run(_measure(plan, embedded, watched, cores))
        leave_if_hung(embedded)
    return {
        "plain loop": inspect.getsource(plain_loop),
        "n": plan.n,
        "n0": SELECTION_ROWS,
        "requests": plan.requests,
        "rounds": plan.rounds,
        "cores": cores,
        "numerics": embedded.models["default"].numerics.described(),
        **figures,
        "peak memory of a process that certifies one image, MiB": {
            f"n={n}": peak_mib(png(0, 32), ["--n", str(n)], runtime)
            for n in (plan.n, LONGER * plan.n)
        },
        "1000 rows of noise on one thread, seconds": round(_noise_seconds(), 4),
    }


async def _measure(plan: Plan, embedded: Embedded, watched: _Watched, cores: int) -> dict[str, Any]:
    rows, bundle = SELECTION_ROWS + plan.n, embedded.tasks["default"]
    images = [png(seed, bundle.resolution) for seed in range(plan.requests)]
    plain = loaded(bundle, _pixels(0, bundle.resolution), SIGMA, rows)

    def loop() -> Tensor:
        torch.set_num_threads(cores)  # The running cpu_threads keep one each.
        return plain()

    ways: dict[str, list[float]] = {"plain loop": [], "smoothing.votes": []}
    latencies: dict[str, list[float]] = {}
    shares: list[float] = []
    async with (
        serving(embedded) as (predictions, address),
        httpx.AsyncClient(base_url=address, timeout=WAIT_SECONDS) as client,
    ):
        model = embedded.models["default"].loaded()
        own = partial(votes, model, _question(bundle.resolution, rows))
        question = {"sigma": str(SIGMA), "n0": str(SELECTION_ROWS), "n": str(plan.n)}
        asks: dict[str, tuple[Ask, int]] = {
            "engine": (partial(ask_desk, predictions, plan.n), plan.requests)
        }
        for concurrency in CONCURRENCIES:
            asks[f"http, {concurrency} at once"] = partial(post, client, question), concurrency
        await asyncio.to_thread(loop)
        await driven(asks["engine"][0], images[:1], 1)
        for _ in range(plan.rounds):
            for way, (ask, concurrency) in asks.items():
                for direct, function in (("plain loop", loop), ("smoothing.votes", own)):
                    ways[direct].append(rows / await asyncio.to_thread(_seconds, function))
                watched.seconds, began = 0.0, time.perf_counter()
                taken = await driven(ask, images, concurrency)
                passed = time.perf_counter() - began
                ways.setdefault(way, []).append(rows * len(images) / passed)
                latencies.setdefault(way, []).extend(taken)
                if way == "engine":
                    cpu_threads = max(1, model.cpu_threads)
                    shares.append(1 - watched.seconds / (cpu_threads * passed))
    speeds = {way: float(np.median(each)) for way, each in ways.items()}
    return {
        "rows/s": {way: round(speed, 1) for way, speed in speeds.items()},
        "engine / plain loop": round(speeds["engine"] / speeds["plain loop"], 3),
        "http / engine": {
            way: round(speed / speeds["engine"], 3)
            for way, speed in speeds.items() if way.startswith("http")
        },
        "latency, seconds": {
            way: percentiles(each) for way, each in latencies.items() if way.startswith("http")
        },
        "share of the engine's time outside the networks": round(float(np.median(shares)), 4),
    }  # fmt: skip


@asynccontextmanager
async def serving(embedded: Embedded) -> AsyncIterator[tuple[Predictions, str]]:
    """The service on a free port of this process: its Predictions and its address, once ready."""
    server = DrainingServer("127.0.0.1", 0)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    services = embedded.services([embedded.worker(on_failure=server.stop)])
    server.config.app = create_app(services)
    serving = asyncio.create_task(server.serve())
    ready = asyncio.create_task(embedded.ready())
    try:
        await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            raise RuntimeError("the service stopped before it was ready")
        yield services.predictions, server.url
    finally:
        ready.cancel()
        server.stop()
        await serving


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Latencies' p50 and p99, to the millisecond."""
    return {f"p{q}": round(float(np.percentile(seconds, q)), 3) for q in (50, 99)}


async def driven(ask: Ask, images: Sequence[bytes], concurrency: int) -> list[float]:
    """Seconds that each question took, with `concurrency` questions open at once."""
    waiting, taken = iter(images), []

    async def send_all() -> None:
        for image in waiting:
            began = time.perf_counter()
            await ask(image)
            taken.append(time.perf_counter() - began)

    await asyncio.gather(*(send_all() for _ in range(concurrency)))
    return taken


async def ask_desk(predictions: Predictions, n: int, image: bytes) -> None:
    """Request a certificate of `n` rows without HTTP; raises TimeoutError after WAIT_SECONDS."""
    question = PredictRequest(image=image, sigma=SIGMA, n0=SELECTION_ROWS, n=n)
    job_id = await predictions.submit(question, None, None)
    status = await predictions.ended(job_id, seconds=WAIT_SECONDS)
    if status is None:
        raise TimeoutError(f"no answer within {WAIT_SECONDS} seconds")
    await predictions.to_response(status)


async def post(client: httpx.AsyncClient, question: Mapping[str, str], image: bytes) -> None:
    """Request over HTTP and wait for the answer; raises httpx.HTTPStatusError for a problem."""
    headers = {"Prefer": f"wait={WAIT_SECONDS}"}
    answer = await client.post("/predict", files={"image": image}, data=question, headers=headers)
    answer.raise_for_status()


def _pixels(seed: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def png(seed: int, size: int) -> bytes:
    """A PNG of random pixels, `size` by `size`."""
    stream = io.BytesIO()
    Image.fromarray(_pixels(seed, size)).save(stream, "PNG")
    return stream.getvalue()


def _noise_seconds() -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        noise = partial(discrete_gaussian, NOISE_KEY, 0, 1000, (3, 32, 32), SIGMA)
        noise()
        return min(_seconds(noise) for _ in range(3))
    finally:
        torch.set_num_threads(threads)


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _question(size: int, rows: int) -> Rows:
    pixels = np.ascontiguousarray(_pixels(0, size).transpose(2, 0, 1))
    return Rows(pixels, NOISE_KEY, 0, rows, SIGMA)


def peak_mib(image: bytes, question: Sequence[str], runtime: str) -> int:
    """Peak memory, in MiB, of a new `vouchsafe predict` of one image with these options."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        path.write_bytes(image)
        command = "from service.cli.main import main; main()"
        environment = {"VOUCHSAFE_DATA_DIR": folder, "VOUCHSAFE_RUNTIME": runtime}
        return measured(["-c", command, "predict", str(path), *question, "--json"], environment)[1]


def measured(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    """Output and peak memory, in MiB, of a new Python process with these arguments.

    Raises RuntimeError where it ends with an error.
    """
    child = subprocess.Popen(  # noqa: S603
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        output = child.stdout.read() if child.stdout else ""
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {child.returncode}")
    return output, round(used.ru_maxrss / 1024)
