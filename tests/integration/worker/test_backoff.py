"""A task that cannot be loaded, alone or among several workers."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shutil
import weakref
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from models.bundle import DEFAULT_TASK, PROMPT_STATES, Bundle, BundleError, read_bundle
from models.files import sha256_of
from service.api.app import create_app
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Engine, Worker
from service.errors import Backlog
from service.jobs import Job, State
from service.processes.embedded import Embedded
from service.worker.backoff import FIRST_SECONDS
from service.worker.model import ModelUnavailable
from tests.support.engines import HARNESSES, Harness
from tests.support.fakes import EngineSpy, FakeClock, FakeModel, make_job
from tests.support.serving import png, problem
from tests.support.shelf import Shelf, bundles
from tests.support.working import assert_exact, final, soon, submit, working


class Gap(Shelf):
    """A shelf without the networks of task `a`, for as long as there is the gap."""

    def __init__(self, **options: Any) -> None:
        super().__init__(bundles("default", "a"), **options)
        self.is_open = True
        self.digests = {task: model.digest for task, model in self.cache.items()}

    def load(self, bundle: Bundle, batch_rows: int) -> FakeModel:
        made = super().load(bundle, batch_rows)
        if bundle.id == "a" and self.is_open:
            raise BundleError("a: 'x' is missing")
        return made

    def jobs(self, task: str, count: int) -> list[Job]:
        """Jobs of some batches each."""
        digest = self.digests[task]
        names = [f"{task}-{number}" for number in range(count)]
        return [make_job(name, task=task, bundle=digest, classes=4, n0=4, n=36) for name in names]

    async def fill(self, engine: Engine, *jobs: Job) -> None:
        """Submit the jobs while a worker says to serve them, which is gone then."""
        await engine.pull(Worker("someone", self.digests), 0)
        await submit(engine, *jobs)
        await engine.pull(Worker("someone", {"other": "bundle-c"}), 0)

    async def is_withheld(self, engine: Engine) -> None:
        """Wait until no worker announces the task."""
        async with asyncio.timeout(5):
            while "a" in (await engine.capacity()).digests:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """Each engine, with nobody alive."""
    built = HARNESSES[request.param](request)
    yield built
    await built.close()


async def test_alone_every_job_of_a_task_that_cannot_be_loaded_fails_at_once() -> None:
    """Where no other worker could serve them: the one that was tried has the reason, and what is
    asked beside them and after them is answered."""
    shelf = Gap()
    engine = MemoryEngine(
        EngineOptions(shard_rows=4, lease_seconds=60, unserved_seconds=0, worker_seconds=60),
        poll_seconds=0.01,
    )
    async with working(engine, shelf.cache):
        async with asyncio.timeout(5):
            while not (await engine.capacity()).digests:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        jobs, others = shelf.jobs("a", 6), shelf.jobs("default", 2)
        await submit(engine, *jobs, others[0])
        told = []
        for job in jobs:
            status = await final(engine, job.id)
            assert status.state is State.FAILED
            assert status.problem is not None
            told.append((status.problem["type"].split(":")[-1], status.problem["detail"]))
        assert told[0] == ("task-unusable", "Task \"a\" cannot be loaded: a: 'x' is missing")
        assert {slug for slug, _ in told} <= {"task-unusable", "shard-dead"}
        await engine.submit(others[1])
        for other in others:
            await assert_exact(engine, other)
        capacity = await engine.capacity()
        assert (capacity.backlog_rows, set(capacity.digests)) == (0, {"default"})
    assert shelf.loads.count("a") == 1


async def test_in_a_fleet_a_task_is_announced_again_and_tried_by_the_next_request(
    harness: Harness,
) -> None:
    """One attempt is counted against the batch that found out. Until then jobs wait for other
    workers, new ones are refused, and those of other tasks are answered."""
    shelf, spy = Gap(), EngineSpy(harness.engine)
    jobs, others = shelf.jobs("a", 2), shelf.jobs("default", 2)
    await shelf.fill(harness.engine, *jobs)
    async with working(spy, shelf.cache):
        for tries, seconds in ((1, FIRST_SECONDS), (2, 2 * FIRST_SECONDS)):
            await soon(lambda: len(spy.asked("fail")) == tries)  # noqa: B023
            await shelf.is_withheld(harness.engine)
            pulls = len(spy.asked("pull"))
            with pytest.raises(Backlog, match='No live worker serves task "a"'):
                await harness.engine.submit(replace(jobs[0], id="late"))
            await harness.engine.submit(others[tries - 1])
            await assert_exact(harness.engine, others[tries - 1])
            assert shelf.loads.count("a") == tries
            assert all("a" not in pull[0].bundles for pull in spy.asked("pull")[pulls:])
            shelf.is_open = tries < 2
            shelf.clock.advance(seconds)
        for job in jobs:
            await assert_exact(harness.engine, job)
    assert (len(spy.asked("fail")), shelf.loads.count("a")) == (2, 3)


async def test_nothing_is_loaded_unasked() -> None:
    """A task is announced again once its time is over, and its networks wait for a request."""
    shelf = Gap()
    engine = MemoryEngine(EngineOptions(shard_rows=4, lease_seconds=60), poll_seconds=0.01)
    spy = EngineSpy(engine)
    with pytest.raises(ModelUnavailable):
        shelf.cache["a"].loaded()
    async with working(spy, shelf.cache):
        await soon(lambda: len(spy.asked("pull")) > 2)
        assert all("a" not in pull[0].bundles for pull in spy.asked("pull"))
        shelf.clock.advance(FIRST_SECONDS)
        await soon(lambda: "a" in spy.asked("pull")[-1][0].bundles)
        pulls = len(spy.asked("pull"))
        await soon(lambda: len(spy.asked("pull")) > pulls + 2)
    assert shelf.loads == ["a"]


async def test_jobs_that_no_worker_can_load_fail_with_the_reason(harness: Harness) -> None:
    """Each by its third attempt, an attempt whenever the task is announced again."""
    shelf, engine = Gap(), harness.engine
    jobs = shelf.jobs("a", 2)
    await shelf.fill(engine, *jobs)
    spy = EngineSpy(engine)
    async with working(spy, shelf.cache):
        for attempt in range(3 * len(jobs)):
            await soon(lambda: len(spy.asked("fail")) > attempt)  # noqa: B023
            await shelf.is_withheld(engine)
            shelf.clock.advance(300)
        for job in jobs:
            status = await final(engine, job.id)
            assert status.problem is not None
            assert status.problem["type"] == "urn:vouchsafe:problem:task-unusable"
            assert "'x' is missing" in status.problem["detail"]
        assert (await engine.capacity()).backlog_rows == 0


class Loaded:
    """What was loaded of a task as it failed."""


class Half(FakeModel):
    """A model that loads half of its networks, and fails."""

    loaded: weakref.ref[Loaded] | None = None

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        half = Loaded()
        self.loaded, self.is_available = weakref.ref(half), False
        raise ModelUnavailable("Task 'birds' cannot be loaded")


async def test_a_load_that_fails_leaves_nothing_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    """What it had loaded is gone at once, not only where garbage is collected."""
    caplog.set_level(logging.CRITICAL)  # pytest keeps what is logged, and with it the error.
    engine = MemoryEngine(EngineOptions(shard_rows=10, lease_seconds=5), poll_seconds=0.01)
    await engine.pull(Worker("someone", {"birds": "bundle-b"}), 0)
    await submit(engine, make_job("a", task="birds", bundle="bundle-b"))
    spy, birds = EngineSpy(engine), Half(digest="bundle-b")
    gc.disable()
    try:
        async with working(spy, {"default": FakeModel(), "birds": birds}):
            await soon(lambda: bool(spy.asked("fail")))
            assert birds.loaded is not None
            await soon(lambda: birds.loaded() is None)  # type: ignore[misc]
    finally:
        gc.enable()


def put_broken(tasks: Path, task: str) -> None:
    """Publish a copy of the default task whose hashes are right, and whose states no UNet takes."""
    folder = tasks / task
    shutil.copytree(DEFAULT_TASK, folder)
    states = load_file(folder / PROMPT_STATES)["states"]
    save_file({"states": states[:, :-1].contiguous()}, folder / PROMPT_STATES)
    files = {PROMPT_STATES: sha256_of(folder / PROMPT_STATES)}
    made = replace(read_bundle(DEFAULT_TASK), id=task, files=files)
    (folder / "manifest.json").write_text(json.dumps(made.manifest))


async def test_a_task_whose_networks_fail_is_not_ready_in_one_process(tmp_path: Path) -> None:
    """The caller who finds out gets the reason at once, `/models` and later callers are told that
    nobody serves the task, the default one is served on, and once the time is over the next request
    tries it again."""
    embedded, stop = Embedded(Settings(data_dir=tmp_path)), asyncio.Event()
    clock = embedded.models.clock = FakeClock()
    put_broken(embedded.settings.tasks_folder, "broken")
    app = create_app(embedded.services([embedded.worker(on_failure=stop.set)]))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://service", timeout=120) as client,
    ):

        async def until_ready(*tasks: str) -> None:
            async with asyncio.timeout(120):
                while await ready() != set(tasks):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        async def ready() -> set[str]:
            models = (await client.get("/models")).json()["models"]
            return {model["task"] for model in models if model["ready"]}

        async def ask(task: str) -> httpx.Response:
            fields = {"task": task, "n": "40", "n0": "10"}
            return await client.post("/predict", files={"image": png()}, data=fields)

        await until_ready("default", "broken")
        for seconds in (FIRST_SECONDS, 2 * FIRST_SECONDS):
            told = problem(await ask("broken"), 500, "task-unusable")
            assert told["detail"].startswith('Task "broken" cannot be loaded: ')
            await until_ready("default")
            refused = await ask("broken")
            told = problem(refused, 503, "backlog")
            assert told["detail"].startswith('No live worker serves task "broken"')
            assert (await ask("default")).status_code == 200
            clock.advance(seconds - 1)
            assert await ready() == {"default"}
            clock.advance(1)
            await until_ready("default", "broken")
    embedded.thread.close()
