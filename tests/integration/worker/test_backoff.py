"""service/worker/backoff.py: a task that cannot be loaded, alone or among several workers."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.redis_server import RedisServer
from models.bundle import Bundle, BundleError
from models.memory import TooLittleMemory
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.protocol import Engine, Worker
from service.errors import Backlog
from service.jobs import Job, Mode, State
from service.processes.runtime import Serving
from service.worker.backoff import (
    LONGEST_REFUSAL_SECONDS,
    LONGEST_REST_SECONDS,
    REFUSAL_SECONDS,
    REST,
)
from service.worker.compute import DeviceFailed
from service.worker.model import ModelUnavailable
from service.worker.model_cache import ROOM_SECONDS
from tests.integration.engine.test_conformance import HARNESSES, Harness, RedisHarness
from tests.integration.worker.test_loop import assert_exact, final, rows_in, soon, submit, working
from tests.integration.worker.test_model_cache import Shelf, bundles
from tests.support.fakes import EngineSpy, FakeModel, make_job


class Gap(Shelf):
    """A shelf without the networks of task `a`, for as long as there is the gap."""

    def __init__(self, **options: Any) -> None:
        super().__init__(bundles("default", "a"), **options)
        self.is_open = True
        self.digests = {task: model.digest for task, model in self.networks.items()}

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
        """Submit the jobs while somebody says to serve them, and is gone then."""
        await engine.pull(Worker("someone", self.digests), 0)
        await submit(engine, *jobs)
        await engine.pull(Worker("someone", {}), 0)

    async def is_refused_by(self, engine: Engine) -> None:
        """Wait until no worker says that it serves the task."""
        async with asyncio.timeout(5):
            while (await engine.capacity()).digests.keys() != {"default"}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """Each engine, with nobody alive."""
    built = HARNESSES[request.param](request)
    yield built
    await built.close()


@pytest.fixture
async def redis_harness(redis_server: RedisServer) -> AsyncIterator[RedisHarness]:
    """An engine over Redis, with nobody alive."""
    built = RedisHarness(redis_server.url)
    yield built
    await built.close()


async def test_alone_every_job_of_a_task_that_cannot_be_loaded_fails_at_once() -> None:
    """Though there are more of them than a batch holds, and no time passes: each with the reason,
    and what is asked beside them and after them is answered."""
    shelf = Gap()
    engine = MemoryEngine(shard_rows=4, lease_seconds=60, poll_seconds=0.01)
    jobs, others = shelf.jobs("a", 6), shelf.jobs("default", 2)
    await shelf.fill(engine, *jobs, others[0])
    async with working(engine, shelf.networks):
        for job in jobs:
            status = await final(engine, job.id)
            assert status.problem is not None
            assert status.problem["type"] == "urn:vouchsafe:problem:task-unusable"
            assert "'x' is missing" in status.problem["detail"]
        await engine.submit(others[1])
        for other in others:
            await assert_exact(engine, other)
        assert (await engine.capacity()).backlog_rows == 0
        assert (await engine.capacity()).digests == {
            task: (digest,) for task, digest in shelf.digests.items()
        }
    assert shelf.loads.count("a") == 1


async def test_in_a_fleet_a_task_is_tried_before_it_is_announced_again(harness: Harness) -> None:
    """One attempt is counted against the batch that found out, and none later: jobs wait for whom
    can load the task, new ones are refused, and those of other tasks are answered."""
    shelf, spy = Gap(in_fleet=True), EngineSpy(harness.engine)
    jobs, others = shelf.jobs("a", 4), shelf.jobs("default", 3)
    await shelf.fill(harness.engine, *jobs)
    async with working(spy, shelf.networks):
        await shelf.is_refused_by(harness.engine)
        await soon(lambda: bool(spy.asked("fail")))
        pulls = len(spy.asked("pull"))
        for tries, seconds in ((2, REFUSAL_SECONDS), (3, 2 * REFUSAL_SECONDS)):
            with pytest.raises(Backlog, match='No live worker serves task "a"'):
                await harness.engine.submit(replace(jobs[0], id="late"))
            await harness.engine.submit(others[tries - 2])
            await assert_exact(harness.engine, others[tries - 2])
            shelf.clock.advance(seconds)
            await soon(lambda: shelf.loads.count("a") == tries)  # noqa: B023
        await harness.engine.submit(others[2])
        await assert_exact(harness.engine, others[2])
        assert {task for pull in spy.asked("pull")[pulls:] for task in pull[0].bundles} == {
            "default"
        }
        assert len(spy.asked("fail")) == 1
        shelf.is_open = False
        shelf.clock.advance(4 * REFUSAL_SECONDS)
        for job in jobs:
            await assert_exact(harness.engine, job)
    assert len(spy.asked("fail")) == 1


async def test_jobs_that_no_worker_of_a_fleet_can_load_fail_together(
    redis_harness: RedisHarness,
) -> None:
    """Trying again is no serving: after five minutes all of them leave the backlog at once."""
    harness, engine, shelf = redis_harness, redis_harness.engine, Gap(in_fleet=True)
    jobs, others = shelf.jobs("a", 4), shelf.jobs("default", 2)
    await shelf.fill(engine, *jobs, others[0])
    spy = EngineSpy(engine)
    async with working(spy, shelf.networks):
        await assert_exact(engine, others[0])
        await shelf.is_refused_by(engine)
        ended = []
        for _ in range(14):
            await harness.wait(25)
            shelf.clock.advance(25)
            pulls = len(spy.asked("pull"))
            await soon(lambda: len(spy.asked("pull")) > pulls + 2)  # noqa: B023
            await engine.reconcile()
            found = [await engine.status(job.id) for job in jobs]
            ended.append({status.state is State.FAILED for status in found if status})
        assert shelf.loads.count("a") > 3
        assert all(len(each) == 1 for each in ended)
        assert (ended[10], ended[-1]) == ({False}, {True})
        await engine.submit(others[1])
        await assert_exact(engine, others[1])
        assert (await engine.capacity()).backlog_rows == 0


@dataclass
class Due(FakeModel):
    """A refused model that is to be tried again; a try waits until it `may` end."""

    error: Exception | None = None
    may: threading.Event = field(default_factory=threading.Event)
    tries: int = 0

    def try_again(self) -> None:
        self.tries += 1
        self.may.wait()
        self.is_due = False
        if self.error is not None:
            raise self.error
        self.is_refused = False


async def busy(spy: EngineSpy, model: Due, *jobs: Job) -> None:
    """Wait until the try runs long, with nothing held beside it."""
    await soon(lambda: model.tries == 1)
    await submit(spy.engine, *jobs)
    await soon(lambda: bool(spy.asked("release")))


async def test_a_long_try_holds_nothing_up() -> None:
    """What comes for other tasks meanwhile goes back to idle workers, the worker is heard of, and
    once the try has ended it serves all of them."""
    engine = MemoryEngine(shard_rows=10, lease_seconds=5, poll_seconds=0.01)
    birds = Due(digest="bundle-b", is_refused=True, is_due=True)
    spy, cats = EngineSpy(engine), FakeModel(batch_rows=40)
    held, later = make_job("held"), make_job("later", task="birds", bundle="bundle-b")
    async with working(spy, {"default": cats, "birds": birds}, lease_seconds=0.15):
        try:
            await busy(spy, birds, held)
            assert cats.batches == []
            async with working(engine, {"default": FakeModel()}, worker_id="other"):
                await assert_exact(engine, held)
            assert cats.batches == []
        finally:
            birds.may.set()
        await soon(lambda: "birds" in spy.asked("pull")[-1][0].bundles)
        await submit(engine, later)
        await assert_exact(engine, later)
    assert birds.tries == 1


async def test_a_worker_that_is_to_stop_waits_for_no_try() -> None:
    """Nobody needs what would be loaded."""
    engine = MemoryEngine(shard_rows=10, lease_seconds=5, poll_seconds=0.01)
    birds = Due(digest="bundle-b", is_refused=True, is_due=True)
    async with working(engine, {"default": FakeModel(), "birds": birds}) as hall:
        try:
            await soon(lambda: birds.tries == 1)
            hall.stop.set()
            await hall.ends()
        finally:
            birds.may.set()


class Eager(Due):
    """A refused model that is to be tried again as soon as it was."""

    def try_again(self) -> None:
        self.tries += 1
        raise ModelUnavailable("Task 'birds' cannot be loaded")


async def test_what_is_held_is_computed_between_tries() -> None:
    """However often a task is to be tried again, those who are served wait for one try at most."""
    engine = MemoryEngine(shard_rows=10, lease_seconds=5, poll_seconds=0.01)
    await engine.pull(Worker("someone", {"default": "bundle-a"}), 1)
    birds, job = Eager(digest="bundle-b", is_refused=True, is_due=True), make_job("a")
    async with working(engine, {"default": FakeModel(), "birds": birds}):
        await soon(lambda: birds.tries > 1)
        await engine.submit(job)
        await assert_exact(engine, job)


class Loaded:
    """What a try had loaded when it failed."""


class Half(Due):
    """A refused model whose first try loads half of it, and fails."""

    loaded: weakref.ref[Loaded] | None = None

    def try_again(self) -> None:
        self.tries += 1
        if self.tries > 1:
            return
        half = Loaded()
        self.loaded = weakref.ref(half)
        raise ModelUnavailable("Task 'birds' cannot be loaded")


async def test_a_vain_try_leaves_nothing_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    """What it had loaded is gone at once, not only where garbage is collected."""
    caplog.set_level(logging.ERROR)  # pytest keeps what is logged, and with it the error.
    engine = MemoryEngine(shard_rows=10, lease_seconds=5, poll_seconds=0.01)
    birds = Half(digest="bundle-b", is_refused=True, is_due=True)
    gc.disable()
    try:
        async with working(engine, {"default": FakeModel(), "birds": birds}):
            await soon(lambda: birds.tries > 1)
            assert birds.loaded is not None
            assert birds.loaded() is None
    finally:
        gc.enable()


class Soon(FakeModel):
    """A model during whose first batch the other task becomes due."""

    other: Due

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        self.other.is_due = True
        return super().votes(parts, digest)


async def test_a_shard_that_is_begun_waits_for_no_try() -> None:
    """It can go to nobody else, and is computed to its end first."""
    engine = MemoryEngine(shard_rows=10, lease_seconds=5, poll_seconds=0.01)
    await engine.pull(Worker("someone", {"default": "bundle-a"}), 0)
    cats, birds = Soon(batch_rows=4), Due(digest="bundle-b", is_refused=True)
    cats.other, job = birds, make_job("long", n0=0, n=10, mode=Mode.PREDICT)
    await engine.submit(job)
    async with working(engine, {"default": cats, "birds": birds}):
        try:
            await soon(lambda: birds.tries == 1)
            assert [rows_in(batch) for batch in cats.batches] == [4, 4, 2]
        finally:
            birds.may.set()
        await assert_exact(engine, job)


def test_a_task_is_tried_again_in_the_room_there_is() -> None:
    """Though memory runs out, nobody's networks go for what nobody asks for, nor is it tried at
    other shapes, until room was made for it an hour ago; it stays where fewer are loaded than may
    be."""
    shelf = Shelf(bundles("default", "a", "b", "c"), most=2, in_fleet=True)
    model, short = shelf.networks["c"], TooLittleMemory("stage II")
    shelf.failures = [short, short]
    with pytest.raises(ModelUnavailable):
        model.loaded()
    shelf.use("default", "a", "b")
    for error in (short, torch.OutOfMemoryError("CUDA out of memory.")):
        shelf.clock.advance(LONGEST_REFUSAL_SECONDS)
        shelf.loads, shelf.failures = [], [error]
        with pytest.raises(ModelUnavailable):
            model.try_again()
        assert (shelf.loads, shelf.loaded) == (["c"], {"default", "a", "b"})
    model.try_again()
    assert not model.is_refused
    assert shelf.loaded == {"default", "a", "b"}
    shelf.failures = [short, short]
    with pytest.raises(ModelUnavailable):
        model.loaded()
    shelf.clock.advance(ROOM_SECONDS)
    shelf.use("default", "a")
    shelf.failures = [short]
    model.try_again()
    assert shelf.loaded == {"default", "c"}
    shelf.use("a")
    assert shelf.loaded == {"default", "a", "c"}


def test_a_try_that_takes_long_is_not_soon_repeated() -> None:
    """What nobody asks for leaves the thread to others most of the time."""
    shelf = Shelf(bundles("default", "a"), in_fleet=True)
    model, takes = shelf.networks["a"], iter((150, 150, 1_500))

    def slow(bundle: Bundle, rows: int) -> FakeModel:
        shelf.clock.advance(next(takes))
        raise BundleError("'x' is missing")

    shelf.networks.loading = replace(shelf.networks.loading, load=slow)  # type: ignore[arg-type]
    for attempt, rest in (
        (model.loaded, REFUSAL_SECONDS),
        (model.try_again, REST * 150),
        (model.try_again, LONGEST_REST_SECONDS),
    ):
        with pytest.raises(ModelUnavailable):
            attempt()
        shelf.clock.advance(rest - 1)
        assert not model.is_due
        shelf.clock.advance(1)
        assert model.is_due


@pytest.mark.parametrize("others", [[], [make_job("held")]])
async def test_a_try_on_a_broken_device_ends_the_worker(others: Sequence[Job]) -> None:
    """No job is to blame, for none was computed."""
    engine = MemoryEngine(shard_rows=10, lease_seconds=5, poll_seconds=0.01)
    spy = EngineSpy(engine)
    await engine.pull(Worker("someone", {"default": "bundle-a"}), 1)
    await submit(engine, *others)
    birds = Due(digest="bundle-b", is_refused=True, is_due=True)
    birds.error = DeviceFailed("the same rows got two answers")
    birds.may.set()
    async with working(spy, {"default": FakeModel(), "birds": birds}) as hall:
        with pytest.raises(DeviceFailed):
            await hall.ends()
    assert spy.asked("fail") == []
    left = await engine.pull(Worker("someone", {"default": "bundle-a"}), 1_000)
    assert len(left) == 4 * len(others)


@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:1/0"])
def test_only_a_fleet_s_workers_withhold_a_task(tmp_path: Path, url: str | None) -> None:
    """A single process has nobody who could answer in its place."""
    serving = Serving(Settings.model_validate({"data_dir": tmp_path, "redis_url": url}))
    assert serving.models.loading.in_fleet == (url is not None)
    serving.thread.close()
