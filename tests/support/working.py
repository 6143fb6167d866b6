"""A worker over any engine, and models that misbehave."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from service.engine.protocol import (
    Engine,
    Lease,
    Worker,
)
from service.jobs import Domain, Job, JobStatus, State
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.loop import work
from service.worker.model import DigestChanged, ModelUnavailable
from tests.support.fakes import EngineSpy, FakeModel, make_job, true_votes

OTHER = Worker("other", {"default": "bundle-a"})


class Hall:
    """A worker at work: the event that stops it, its task, and its thread."""

    def __init__(self, stop: asyncio.Event, task: asyncio.Task[None], thread: ComputeThread):
        self.stop, self.task, self.thread = stop, task, thread

    async def ends(self) -> None:
        """Wait until the worker has returned, or raise what it raised."""
        async with asyncio.timeout(5):
            await self.task


@asynccontextmanager
async def working(
    engine: Any,
    models: Mapping[str, Any],
    *,
    worker_id: str = "w",
    lease_seconds: float = 5.0,
    limit: float = 60.0,
) -> AsyncIterator[Hall]:
    """A worker that is stopped on leaving, if it still runs."""
    stop, thread = asyncio.Event(), ComputeThread(batch_seconds_limit=limit)
    task = asyncio.create_task(
        work(
            engine,
            models,
            worker_id=worker_id,
            stop=stop,
            thread=thread,
            lease_seconds=lease_seconds,
        )
    )
    hall = Hall(stop, task, thread)
    try:
        yield hall
    finally:
        stop.set()
        for model in models.values():
            if isinstance(model, FakeModel):
                model.gate.set()
        await asyncio.wait({task}, timeout=5)
        thread.close()


async def final(engine: Engine, job_id: str) -> JobStatus:
    """The last status of a job that ends within some seconds."""
    async with asyncio.timeout(5):
        *_, last = [status async for status in engine.watch(job_id)]
    return last


async def soon(condition: Callable[[], bool]) -> None:
    """Let other tasks run until the condition holds, failing after half a minute."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the fakes have nothing to wait on.
            await asyncio.sleep(0.001)


async def assert_exact(engine: Engine, job: Job) -> None:
    """The job succeeds with exactly its rows' votes."""
    status = await final(engine, job.id)
    assert status.state is State.SUCCEEDED
    assert status.selection == true_votes(job, Domain.SELECTION)
    assert status.estimation == true_votes(job, Domain.ESTIMATION)


async def submit(engine: Engine, *jobs: Job) -> None:
    for job in jobs:
        await engine.submit(job)


def keys(*jobs: Job) -> set[bytes]:
    """The keys under which rows of the jobs are drawn."""
    return {job.domain_key(domain) for job in jobs for domain in Domain}


def rows_in(batch: Iterable[tuple[bytes, int, int]]) -> int:
    return sum(stop - start for _, start, stop in batch)


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Lowering(FakeModel):
    """A model whose networks are loaded for smaller batches at its `last` batch of the first
    shape."""

    last = 1

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        if self.digest == "bundle-a" and len(self.batches) + 1 == self.last:
            self.digest, self.batch_rows = "bundle-lower", 4
            raise DigestChanged("memory ran out")
        return super().votes(parts, digest)


async def others_hold(engine: Engine, shards: int) -> list[Lease]:
    """Another worker pulls until it has so many shards."""
    leases: list[Lease] = []
    async with asyncio.timeout(30):
        while len(leases) < shards:
            leases += await engine.pull(OTHER, 1000)
    return leases


async def served(engine: Engine, digest: str) -> None:
    """Wait until a live worker serves the default task under this digest."""
    async with asyncio.timeout(30):
        while (await engine.capacity()).digests["default"][0] != digest:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@asynccontextmanager
async def slow_batch(
    spy: EngineSpy, *jobs: Job, is_loaded: bool = False
) -> AsyncIterator[tuple[FakeModel, FakeModel]]:
    """A worker whose first batch, of `birds`, loads networks or runs long until its gate is opened.

    Yields that model and the default one, for whose jobs there is work beside it.
    """
    cats = FakeModel(batch_rows=40)
    birds = FakeModel(batch_rows=20, digest="bundle-b", is_loaded=is_loaded)
    birds.gate.clear()
    await submit(spy.engine, make_job("birds", n0=0, n=20, task="birds", bundle="bundle-b"), *jobs)
    async with working(spy, {"birds": birds, "default": cats}, lease_seconds=0.15):
        await soon(lambda: bool(birds.batches))
        yield birds, cats


def pulled(spy: EngineSpy) -> list[int]:
    """The rows of every pull that leased some."""
    return [rows for _, rows, *_ in spy.asked("pull") if rows]


class Breaking(FakeModel):
    """A model whose device computes nothing any more after a batch with a key of `poison`."""

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        self.broken = self.broken or any(part.key in self.poison for part in parts)
        return super().votes(parts, digest)


class Vanishing(FakeModel):
    """A model whose networks cannot be loaded any more once they are `gone`."""

    gone = False

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        if self.gone:
            raise ModelUnavailable("Task 'birds' cannot be loaded: a file is missing")
        return super().votes(parts, digest)


class Withheld(FakeModel):
    """A model whose networks cannot be loaded, and which is not announced for a while."""

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        self.is_available = False
        raise ModelUnavailable("Task 'default' cannot be loaded: a file is missing")


class Ending(FakeModel):
    """A model whose networks end the process, at once or `after` so many batches."""

    after = 0

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        if len(self.batches) >= self.after:
            raise DeviceFailed("the same rows got two answers")
        return super().votes(parts, digest)


class Holding(FakeModel):
    """A model whose failing calls hold activations, of which some live on as another call begins.

    The error that is raised comes of one that has a call of its own.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.held: list[weakref.ref[Any]] = []
        self.alive: list[int] = []

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        self.alive.append(sum(each() is not None for each in self.held))
        activations = self._activations()
        try:
            self._kernel()
        except KeyError as error:
            if any(part.key in self.poison for part in parts):
                raise RuntimeError("the networks' logits are not finite") from error
        del activations
        return super().votes(parts, digest)

    def _kernel(self) -> None:
        workspace = self._activations()
        raise KeyError(len(workspace))

    def _activations(self) -> set[int]:
        made = type("Activations", (set,), {})()
        self.held.append(weakref.ref(made))
        return made
