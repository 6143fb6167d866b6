"""service/predictions/restarts.py: jobs whose digest is served no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import Bundle, BundleError
from models.rows import Rows
from models.smoothing import SmoothedModel, load, votes
from service.config import Settings
from service.engine.protocol import Capacity, Engine, Worker
from service.errors import TaskNotReady
from service.jobs import Domain, Job, JobStatus, State, noise_key
from service.operations import metrics
from service.predictions import service as predictions
from service.predictions.restarts import MOST_RESTARTS, PATIENCE, Restarts
from service.predictions.schemas import PredictRequest
from service.predictions.service import Predictions
from service.processes.embedded import Embedded
from service.worker.compute import DeviceFailed
from tests.integration.engine.test_conformance import HARNESSES
from tests.integration.worker.test_loop import soon
from tests.support import fakes
from tests.support.fakes import EngineSpy, fake_votes, true_votes
from tests.support.serving import DIGEST, SECRET, TASKS, Service, png

TASK = {"default": replace(TASKS["default"], labels=("ant", "bee", "cat"))}
SHAPES = [{"batch_rows": rows} for rows in range(20, 4, -1)]
DIGESTS = [TASK["default"].served_digest(shape) for shape in SHAPES]
OLD, NEW, MIDDLE, *OTHERS = DIGESTS
ASKED = TASK["default"].digest
LATER = replace(TASKS["default"], k=2.0)
make_job = partial(fakes.make_job, bundle=OLD, task_digest=ASKED)
LONG = PATIENCE + 3
"""Looks after which a job would have begun anew."""


@pytest.fixture(params=HARNESSES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """An engine of one worker that serves the old digest."""
    harness = HARNESSES[request.param](request)
    await serves(harness.engine, "w", OLD)
    yield harness.engine
    await harness.close()


async def serves(engine: Engine, worker: str, digest: str) -> None:
    """Announce a worker of this digest; what it leases goes back at once."""
    await engine.release(await engine.pull(Worker(worker, {"default": digest}, SHAPES), 1))


def restarts(engine: Any, tasks: Any = TASK) -> Restarts:
    return Restarts(engine, tasks, SECRET, seconds=0.005)


async def under(engine: Engine, job: Job, digest: str) -> JobStatus:
    """The job's status once it is under this digest."""
    async with asyncio.timeout(5):
        async for status in engine.watch(job.id):
            if status.job.bundle == digest:
                return status
    raise AssertionError(f"{job.id} ended under another digest")


async def looks(spy: EngineSpy, times: int) -> None:
    """Wait until the engine has been looked at so many times more."""
    wanted = len(spy.asked("capacity")) + times
    await soon(lambda: len(spy.asked("capacity")) >= wanted)


async def test_a_job_that_nobody_serves_begins_anew_under_the_digest_that_is_served(
    engine: Engine,
) -> None:
    """Its votes are thrown away, its key is the new digest's own, and its answer is exact."""
    job, told = make_job("a"), metrics.RESTARTS._value.get()
    await engine.submit(job)
    counted, late = await engine.pull(Worker("w", {"default": OLD}, SHAPES), 20)
    await engine.commit(counted, [10, 0, 0])
    looking = restarts(engine)
    looking.begin(job)
    await serves(engine, "w", NEW)
    status = await under(engine, job, NEW)
    assert (status.state, status.rows_done, sum(status.selection)) == (State.QUEUED, 0, 0)
    assert status.job.key == noise_key(SECRET, replace(job, bundle=NEW))
    assert replace(status.job, key=job.key, bundle=OLD, pixels=job.pixels) == job
    assert metrics.RESTARTS._value.get() == told + 1
    assert not await engine.commit(late, [0, 10, 0])
    for lease in await engine.pull(Worker("w", {"default": NEW}, SHAPES), 1_000):
        key, shard = lease.job.domain_key(lease.shard.domain), lease.shard
        await engine.commit(lease, fake_votes(key, range(shard.start, shard.stop), 3))
    last = await engine.status(job.id)
    assert last is not None
    assert last.state is State.SUCCEEDED
    assert last.selection == true_votes(last.job, Domain.SELECTION)
    assert last.estimation == true_votes(last.job, Domain.ESTIMATION)
    await looking.close()


async def test_jobs_stay_while_anybody_serves_them(engine: Engine) -> None:
    """One worker of the old digest is enough; so is none at all, for it may come back."""
    spy, jobs = EngineSpy(engine), [make_job("a"), make_job("b", task="birds", bundle=OLD)]
    await engine.pull(Worker("bird", {"birds": OLD}, SHAPES), 1)
    for job in jobs:
        await engine.submit(job)
    for worker in ("x", "y"):
        await serves(engine, worker, NEW)
    await engine.pull(Worker("bird", {"default": NEW}, SHAPES), 1)
    looking = restarts(spy)
    for job in jobs:
        looking.begin(job)
    await looks(spy, LONG)
    assert spy.asked("restart") == []
    await looking.close()


async def test_another_question_is_not_restarted(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the task is gone, or another bundle by now or from the beginning, jobs are not asked of
    it."""
    changed = {"default": replace(TASK["default"], k=2.0)}
    for name, first, later in (
        ("gone", TASK, {}),
        ("changed", TASK, changed),
        ("changed before", changed, changed),
    ):
        tasks, spy, job = dict(first), EngineSpy(engine), make_job(name)
        await serves(engine, "w", OLD)
        await engine.submit(job)
        await serves(engine, "w", NEW)
        looking = restarts(spy, tasks)
        looking.begin(job)
        tasks.clear()
        tasks.update(later)
        await looks(spy, LONG)
        assert spy.asked("restart") == []
        await looking.close()
    assert caplog.records == []


class Returning(EngineSpy):
    """Every so many looks the old digest is there, and else the new one alone."""

    async def capacity(self) -> Capacity:
        self.calls.append(("capacity", ()))
        digest = OLD if len(self.asked("capacity")) % PATIENCE == 0 else NEW
        return Capacity(0, 0.0, {"default": (digest,)}, numerics=tuple(SHAPES))


async def test_a_worker_that_is_missed_for_a_moment_keeps_its_jobs(engine: Engine) -> None:
    """After an outage workers come back one by one: a few looks decide nothing."""
    spy, job = Returning(engine), make_job("a")
    await engine.submit(job)
    looking = restarts(spy)
    looking.begin(job)
    await looks(spy, 3 * PATIENCE)
    assert spy.asked("restart") == []
    await looking.close()


async def test_keys_are_of_the_pixels_though_the_engine_tells_none(engine: Engine) -> None:
    """Two images of one shape that begin anew have the keys that they would be given now."""
    jobs = [replace(make_job("a"), pixels=bytes([shade] * 12)) for shade in (1, 2)]
    jobs[1] = replace(jobs[1], id="b")
    looking = restarts(engine)
    for job in jobs:
        await engine.submit(job)
        looking.begin(job)
    await serves(engine, "w", NEW)
    for job in jobs:
        wanted = noise_key(SECRET, replace(job, bundle=NEW))
        assert (await under(engine, job, NEW)).job.key == wanted
    await looking.close()


async def test_a_job_begins_anew_a_bounded_number_of_times(engine: Engine) -> None:
    """Workers that lose their shape again and again do not keep a job for ever."""
    spy, job = EngineSpy(engine), make_job("a")
    await engine.submit(job)
    looking = restarts(spy)
    looking.begin(job)
    for turn in range(MOST_RESTARTS):
        await serves(engine, "w", OTHERS[turn])
        await under(engine, job, OTHERS[turn])
    await serves(engine, "w", NEW)
    await looks(spy, LONG)
    assert len(spy.asked("restart")) == MOST_RESTARTS
    await looking.close()


async def test_a_job_that_ends_as_it_begins_anew_is_over(engine: Engine) -> None:
    """Nobody looks after it any more, and one that raises keeps nobody from the others."""
    jobs = [make_job("bad"), make_job("ends"), make_job("good")]

    class Ending(EngineSpy):
        async def status(self, job_id: str) -> JobStatus | None:
            if job_id == "bad":
                raise ZeroDivisionError
            return await self.engine.status(job_id)

        async def restart(self, job_id: str, *asked: Any) -> bool:
            if job_id == "ends":
                looking.end(job_id)
            return await self.engine.restart(job_id, *asked)

    looking = restarts(Ending(engine))
    for job in jobs:
        await engine.submit(job)
        looking.begin(job)
    await serves(engine, "w", NEW)
    await under(engine, jobs[2], NEW)
    assert looking._open.keys() == {"bad", "good"}
    await looking.close()


async def test_an_engine_that_is_away_is_asked_again(engine: Engine) -> None:
    """An outage, or an answer that was lost in one, ends nothing."""
    troubles = iter([True, True, *[False] * 2 * PATIENCE, True, False, True, *[False] * 20, True])
    spy, job = EngineSpy(engine, lambda: next(troubles, False)), make_job("a")
    await engine.submit(job)
    await serves(engine, "w", NEW)
    looking = restarts(spy)
    looking.begin(job)
    await under(engine, job, NEW)
    await looks(spy, LONG)
    assert (await engine.status(job.id)).job.bundle == NEW  # type: ignore[union-attr]
    await looking.close()


async def test_an_engine_that_errs_is_asked_again(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that was not foreseen is logged, and the looking goes on."""
    troubles = iter([True])

    class Erring(EngineSpy):
        async def capacity(self) -> Capacity:
            if next(troubles, False):
                raise ZeroDivisionError
            return await self.engine.capacity()

    job = make_job("a")
    await engine.submit(job)
    await serves(engine, "w", NEW)
    looking = restarts(Erring(engine))
    looking.begin(job)
    await under(engine, job, NEW)
    await looking.close()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the open jobs could not be looked after"
    ]


async def test_a_job_that_others_began_anew_is_not_begun_again(engine: Engine) -> None:
    """Where its record has another digest than was known here, that one is missed from then on."""
    spy, job = EngineSpy(engine), make_job("a")
    await engine.submit(job)
    assert await engine.restart(job.id, MIDDLE, bytes(32))
    await serves(engine, "w", NEW)
    await serves(engine, "x", MIDDLE)
    looking = restarts(spy)
    looking.begin(job)
    await looks(spy, 2 * LONG)
    assert spy.asked("restart") == []
    assert len(spy.asked("status")) == 1
    await looking.close()


async def test_a_job_that_has_ended_is_not_begun_again(engine: Engine) -> None:
    """Nor is the engine asked to."""
    spy, job = EngineSpy(engine), make_job("a")
    await engine.submit(job)
    await engine.cancel(job.id)
    await serves(engine, "w", NEW)
    looking = restarts(spy)
    looking.begin(job)
    await soon(lambda: len(spy.asked("status")) > 1)
    assert spy.asked("restart") == []
    await looking.close()


async def test_nobody_looks_once_closed(engine: Engine) -> None:
    """Neither after what was open, nor after what begins then."""
    spy, job = EngineSpy(engine), make_job("a")
    looking = restarts(spy)
    looking.begin(job)
    await looks(spy, 1)
    looked = looking._looking
    await looking.close()
    assert looked is not None
    assert looked.done()
    looking.begin(make_job("b"))
    assert looking._looking is looked


async def serves_both(engine: Engine) -> None:
    """Announce workers of the task that `Replacing` has at first, and of the one that comes."""
    for worker, bundle in (("first", TASKS["default"]), ("later", LATER)):
        digest = bundle.served_digest(SHAPES[0])
        await engine.pull(Worker(worker, {"default": digest}, SHAPES), 0)


class Replacing(EngineSpy):
    """An engine beside which the default task is replaced as it takes the first job."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.tasks = dict(TASKS)

    def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        return self.engine.watch(job_id)

    async def submit(self, *asked: Any, **more: Any) -> str:
        job_id = await self.engine.submit(*asked, **more)
        if self.tasks["default"] is TASKS["default"]:
            self.tasks["default"] = LATER
        return job_id


async def test_a_task_that_changes_as_it_is_asked_is_another_question(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose bundle is replaced while the question is on its way never begins anew under the
    other; the caller is told to ask again, and nothing is kept that a key would repeat."""
    await serves_both(engine)
    begun: list[str] = []
    spy = Replacing(engine)
    desk = Predictions(Settings(data_dir=tmp_path), spy, spy.tasks, SECRET)
    monkeypatch.setattr(desk._restarts, "begin", lambda job: begun.append(job.task_digest))
    asked = PredictRequest.model_validate({"image": png(), "n": 30, "n0": 10})
    with pytest.raises(TaskNotReady, match='"default" changed as it was asked; ask again') as told:
        await desk.submit(asked, "ada", "key")
    assert told.value.retry_after == 1
    assert begun == [TASKS["default"].digest]
    assert (await engine.capacity()).backlog_rows == 0
    job_id = await desk.submit(asked, "ada", "key")
    assert (await desk.status(job_id, "ada")).state is State.QUEUED
    await desk.close()


async def test_what_is_to_be_asked_again_is_forgotten_after_an_outage(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine is out of reach just then, the key is free once it answers again."""
    await serves_both(engine)
    monkeypatch.setattr(predictions, "_AWAY_SECONDS", 0.01)
    spy = Replacing(engine)
    spy.trouble = lambda: spy.calls[-1][0] == "forget" and len(spy.asked("forget")) < 3
    desk = Predictions(Settings(data_dir=tmp_path), spy, spy.tasks, SECRET)
    asked = PredictRequest.model_validate({"image": png(), "n": 30, "n0": 10})
    with pytest.raises(TaskNotReady):
        await desk.submit(asked, "ada", "key")
    await soon(lambda: len(spy.asked("forget")) == 3 and not desk._forgetting)
    assert (await engine.capacity()).backlog_rows == 0
    job_id = await desk.submit(asked, "ada", "key")
    assert (await desk.status(job_id, "ada")).state is State.QUEUED
    await desk.close()


async def test_nobody_looks_after_jobs_that_are_over(engine: Engine) -> None:
    """The engine is asked only while a job of this process is open."""
    spy, first, second = EngineSpy(engine), make_job("a"), make_job("b")
    looking = restarts(spy)
    looking.begin(first)
    await looks(spy, 1)
    looking.end("a")
    await soon(lambda: looking._looking is not None and looking._looking.done())
    looking.begin(second)
    await looks(spy, 1)
    await looking.close()


async def test_a_caller_gets_the_answer_of_the_new_digest(service: Service) -> None:
    """Who waits for a job that restarts waits on, and its certificate names the new digest."""
    service.app.state.predictions._restarts._seconds = 0.005
    service.voter.open.clear()
    waiting = asyncio.create_task(service.ask(n="1000"))
    await service.voter.busy.wait()
    new = TASKS["default"].served_digest(SHAPES[1])
    service.voter.bundles, service.voter.numerics = {"default": new}, [SHAPES[1]]
    service.voter.open.set()
    answered = (await waiting).json()
    assert answered["bundle"] == new
    assert DIGEST in {lease.job.bundle for lease in service.voter.leases}
    assert sum(count["count"] for count in answered["counts"]) == 1000
    first = {lease.job.key for lease in service.voter.leases if lease.job.bundle == DIGEST}
    assert first.isdisjoint(
        {lease.job.key for lease in service.voter.leases if lease.job.bundle == new}
    )


async def test_a_job_in_flight_outlives_a_device_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nano's device runs out of memory at its usual shape in the middle of a job: the job ends with
    the votes of networks that were loaded for the smaller shape, every one under its own key."""
    embedded, stop = Embedded(Settings(data_dir=tmp_path)), asyncio.Event()
    usual, counted = embedded.models["default"].numerics.batch_rows, SmoothedModel.votes
    batches: list[int] = []

    def short(model: SmoothedModel, parts: Sequence[Rows]) -> NDArray[np.int64]:
        batches.append(model.numerics.batch_rows)
        if model.numerics.batch_rows == usual and len(batches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return counted(model, parts)

    monkeypatch.setattr(SmoothedModel, "votes", short)
    working = asyncio.create_task(embedded.worker(on_failure=stop.set)(stop))
    desk = Predictions(
        embedded.settings, embedded.engine, embedded.tasks, embedded.secret, look_seconds=0.05
    )
    await embedded.ready()
    first_digest = embedded.models["default"].digest
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    asked = PredictRequest.model_validate({"image": png(pixels), "n": 300, "n0": 20})
    job_id = await desk.submit(asked, None, None)
    status = await desk.ended(job_id, 60)
    stop.set()
    await asyncio.gather(working, desk.close())
    monkeypatch.undo()
    assert status is not None
    assert status.state is State.SUCCEEDED
    bundle = embedded.tasks["default"]
    numerics = replace(embedded.models.loading.numerics, batch_rows=usual // 2)
    lowered = bundle.served_digest(numerics.described())
    assert batches[:2] == [usual] * 2  # Counted, and short.
    assert set(batches[2:]) == {usual // 2}
    assert desk.answer(status).bundle == lowered != first_digest
    model = load(bundle, batch_rows=usual // 2, lanes=embedded.models.loading.lanes)
    image = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    assert status.job.bundle == lowered
    assert status.job.key == noise_key(embedded.secret, replace(status.job, pixels=image.tobytes()))
    rows = Rows(image, status.job.domain_key(Domain.ESTIMATION), 0, 300, 0.25)
    assert status.estimation == tuple(votes(model, rows).tolist())


async def test_a_server_that_cannot_be_lowered_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the default task's networks are gone and cannot be had in a smaller shape, the process
    is told to end, as at its start: nobody would ask one that is not ready, and load them."""
    embedded, ending, stop = Embedded(Settings(data_dir=tmp_path)), asyncio.Event(), asyncio.Event()
    usual, loading = embedded.models["default"].numerics.batch_rows, embedded.models.loading

    def gone(bundle: Bundle, rows: int) -> SmoothedModel:
        if rows < usual:
            raise BundleError("the volume is gone")
        return loading.load(bundle, rows)

    def short(*_: Any) -> NDArray[np.int64]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    embedded.models.loading = replace(loading, load=gone)
    monkeypatch.setattr(SmoothedModel, "votes", short)
    working = asyncio.create_task(embedded.worker(on_failure=ending.set)(stop))
    await embedded.ready()
    digest = embedded.models["default"].digest
    job = make_job("a", bundle=digest, classes=embedded.models["default"].classes)
    await embedded.engine.submit(job)
    with pytest.raises(DeviceFailed, match=r"memory ran out for a batch, .* the volume is gone"):
        await working
    assert embedded.failed
    assert ending.is_set()
    held = await embedded.engine.pull(Worker("other", {"default": digest}, SHAPES), 1_000)
    assert sum(lease.shard.rows for lease in held) == 40
    assert not any(lease.solitary for lease in held)
