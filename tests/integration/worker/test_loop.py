"""service/worker/loop.py: the loop between an engine and a device, in good and in bad times."""

from __future__ import annotations

import asyncio
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from service.engine.connection import EngineConnection
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Engine,
    Lease,
    Worker,
)
from service.jobs import Domain, Job, JobStatus, Mode, State
from service.operations import metrics
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.loop import work
from service.worker.model import DigestChanged, ModelUnavailable
from service.worker.reporter import Reporter
from tests.integration.engine.test_conformance import HARNESSES, LEASE, Harness
from tests.support.fakes import EngineSpy, FakeClock, FakeModel, make_job, true_votes
from tests.unit.operations.test_tracing import TRACE, VALID

OTHER = Worker("other", {"default": "bundle-a"})


@pytest.fixture
async def engine() -> MemoryEngine:
    """An engine of small shards that takes jobs at once."""
    built = MemoryEngine(
        EngineOptions(shard_rows=10, lease_seconds=5, worker_seconds=60), poll_seconds=0.01
    )
    await built.pull(Worker("someone", {"default": "bundle-a", "birds": "bundle-b"}), 1)
    return built


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


# Good times


async def test_jobs_are_answered_exactly(engine: MemoryEngine) -> None:
    """Every row of every job is computed once, whatever batches it travelled in."""
    jobs = [make_job(f"job-{number}", n0=7, n=45) for number in range(6)]
    await submit(engine, *jobs)
    model = FakeModel()
    async with working(engine, {"default": model}):
        for job in jobs:
            await assert_exact(engine, job)
    asked = [(key, row) for b in model.batches for key, *rows in b for row in range(*rows)]
    assert len(asked) == len(set(asked)) == 6 * 52


async def test_batches_are_filled_from_many_jobs(engine: MemoryEngine) -> None:
    """While work waits, device batches are full, of the rows of several jobs."""
    jobs = [make_job(f"job-{number}", mode=Mode.PREDICT, n=6) for number in range(16)]
    await submit(engine, *jobs)
    model = FakeModel()
    async with working(engine, {"default": model}):
        for job in jobs:
            await assert_exact(engine, job)
    sizes = [rows_in(batch) for batch in model.batches]
    assert sizes == [16] * 6
    assert all(len({key for key, *_ in batch}) >= 3 for batch in model.batches)


async def test_models_run_in_one_thread(engine: MemoryEngine) -> None:
    """All device batches run in the same thread, which is not the event loop's."""

    class Watched(FakeModel):
        def votes(self, parts: Any, digest: str) -> NDArray[np.int64]:
            threads.add(threading.current_thread().name)
            return super().votes(parts, digest)

    threads: set[str] = set()
    job = make_job("a", n=200)
    await submit(engine, job)
    async with working(engine, {"default": Watched()}):
        await assert_exact(engine, job)
    assert len(threads) == 1
    assert threads.pop().startswith("compute")


async def test_one_batch_is_prefetched(engine: MemoryEngine) -> None:
    """While a batch computes the rows of one more are held, and only the first are started."""
    spy, model = EngineSpy(engine), FakeModel(batch_rows=20)
    model.gate.clear()
    await submit(engine, make_job("a", n0=0, n=200))
    async with working(spy, {"default": model}, lease_seconds=60):
        await soon(lambda: len(spy.asked("pull")) == 2 and len(model.batches) == 1)
        await asyncio.sleep(0.05)
        left = await engine.pull(OTHER, 1000)
        (started,) = spy.asked("start")
        assert [lease.shard.index for lease in started[0]] == [0, 1]
        assert [lease.shard.index for lease in left] == list(range(4, 20))


async def test_tasks_in_hand_take_turns(engine: MemoryEngine) -> None:
    """A worker with two tasks answers both, each by its own model."""
    one = make_job("a", n=300)
    two = make_job("b", n=300, task="birds", bundle="bundle-b")
    await submit(engine, one, two)
    cats, birds = FakeModel(), FakeModel(digest="bundle-b")
    async with working(engine, {"default": cats, "birds": birds}):
        await assert_exact(engine, one)
        await assert_exact(engine, two)
    assert {key for batch in birds.batches for key, *_ in batch} == keys(two)


async def test_small_job_is_answered_beside_a_big_one() -> None:
    """Rows in hand are computed in turn, though their neighbour's lot is topped up all the time."""
    engine = MemoryEngine(EngineOptions(shard_rows=10, starvation_seconds=0.05), poll_seconds=0.01)
    await engine.pull(Worker("someone", {"default": "bundle-a", "birds": "bundle-b"}), 1)
    big = make_job("big", n=100_000)
    small = make_job("small", n0=0, n=4, task="birds", bundle="bundle-b")
    models = {"default": FakeModel(delay=0.002), "birds": FakeModel(digest="bundle-b")}
    await submit(engine, big)
    async with working(engine, models):
        await soon(lambda: bool(models["default"].batches))
        await submit(engine, small)
        await assert_exact(engine, small)
        status = await engine.status("big")
        assert status is not None
        assert status.state is State.RUNNING


async def test_models_may_come_and_go(engine: MemoryEngine) -> None:
    """A task that is added while the worker runs is served from its next pull on."""
    models = {"default": FakeModel()}
    async with working(engine, models):
        models["birds"] = FakeModel(digest="bundle-b")
        job = make_job("b", task="birds", bundle="bundle-b")
        await submit(engine, job)
        await assert_exact(engine, job)


async def test_a_task_that_goes_leaves_no_metrics(engine: MemoryEngine) -> None:
    """A batch in hand when its task is removed is counted, but not under the task's name."""
    birds = FakeModel(digest="bundle-b")
    models = {"default": FakeModel(), "birds": birds}
    birds.gate.clear()
    batches = metric("vouchsafe_batch_rows_count")
    await submit(engine, make_job("b", task="birds", bundle="bundle-b"))
    async with working(engine, models):
        await soon(lambda: bool(birds.batches))
        del models["birds"]
        metrics.delete("birds")
        birds.gate.set()
        await soon(lambda: metric("vouchsafe_batch_rows_count") > batches)
    for name in ("vouchsafe_rows_total", "vouchsafe_batches_total"):
        assert REGISTRY.get_sample_value(name, {"task": "birds"}) is None


async def test_shards_of_a_task_that_changed_go_back(engine: MemoryEngine) -> None:
    """A shard pulled while its task got another bundle is handed back, never computed."""
    models = {"default": FakeModel()}

    class Changing(EngineSpy):
        async def pull(self, *arguments: Any) -> list[Lease]:
            leases = await self.engine.pull(*arguments)
            models["default"] = FakeModel(digest="bundle-new")
            return leases

    spy = Changing(engine)
    await submit(engine, make_job("a"))
    async with working(spy, models):
        await soon(lambda: [len(leases) for leases, *_ in spy.asked("release")] == [2])
        assert len(await engine.pull(OTHER, 1000)) == 4
    assert models["default"].batches == []


async def test_a_lot_goes_on_with_the_model_that_its_task_has(engine: MemoryEngine) -> None:
    """Where a task's bundle is read anew and is the same, what comes next is computed by the model
    of that, and not by the one that keeps no networks any more."""
    old, new = FakeModel(), FakeModel()
    models, job = {"default": old}, make_job("a", n0=0, n=300)
    old.gate.clear()
    await submit(engine, job)
    async with working(engine, models):
        await soon(lambda: bool(old.batches))
        models["default"] = new
        old.gate.set()
        await assert_exact(engine, job)
    assert len(old.batches) <= 3


class Lowering(FakeModel):
    """A model whose networks are loaded for smaller batches at its `last` batch of the first
    shape."""

    last = 1

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        if self.digest == "bundle-a" and len(self.batches) + 1 == self.last:
            self.digest, self.batch_rows = "bundle-lower", 4
            raise DigestChanged("memory ran out")
        return super().votes(parts, digest)


@pytest.mark.parametrize("last", [1, 3])
async def test_a_digest_that_changes_takes_no_more_of_its_old_jobs(
    engine: MemoryEngine, last: int
) -> None:
    """What is held under the old digest goes back uncounted and unblamed, for other workers; jobs
    under the new one are answered, in its smaller batches."""
    model = Lowering()
    model.last = last
    old, new = make_job("old", n0=7, n=93), make_job("new", bundle="bundle-lower")
    await submit(engine, old)
    async with working(engine, {"default": model}) as hall:
        await soon(lambda: model.batch_rows == 4)
        await served(engine, "bundle-lower")
        await submit(engine, new)
        await assert_exact(engine, new)
        assert hall.thread.healthy
    assert all(rows_in(b) <= 4 for b in model.batches[last - 1 :])
    assert {key for b in model.batches[last - 1 :] for key, *_ in b} == keys(new)
    async with working(engine, {"default": FakeModel()}):
        await assert_exact(engine, old)


async def test_a_digest_that_changes_hands_back_what_was_begun(engine: MemoryEngine) -> None:
    """Also a shard of several batches of which some are counted: nobody here can go on with it."""
    model = Lowering(batch_rows=4)
    model.last = 2
    await submit(engine, make_job("old"))
    async with working(engine, {"default": model}):
        await served(engine, "bundle-lower")
        assert len(await others_hold(engine, 4)) == 4


async def test_shards_go_back_once_the_engine_answers_again(engine: MemoryEngine) -> None:
    """Handing back is tried until it succeeds, and no shard waits for its lease to run out."""
    spy = EngineSpy(engine)
    spy.trouble = lambda: spy.calls[-1][0] == "release" and len(spy.asked("release")) <= 2
    await submit(engine, make_job("old", n0=0, n=20))
    async with working(spy, {"default": Lowering()}):
        await soon(lambda: len(spy.asked("release")) == 3)
        assert len(await others_hold(engine, 2)) == 2


async def test_a_batch_is_not_computed_under_another_digest(engine: MemoryEngine) -> None:
    """The votes are asked for under the digest that the job is keyed with, whatever it is then."""
    model = FakeModel()

    class Late(EngineSpy):
        async def start(self, leases: Sequence[Lease]) -> list[Lease]:
            model.digest = "bundle-lower"
            return await self.engine.start(leases)

    await submit(engine, make_job("old"))
    async with working(Late(engine), {"default": model}):
        await served(engine, "bundle-lower")
        await others_hold(engine, 4)
    assert model.batches == []


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


async def test_leases_are_renewed_while_a_batch_computes() -> None:
    """A batch may take longer than a lease, and its shards stay with their worker."""
    engine = MemoryEngine(EngineOptions(shard_rows=10, lease_seconds=3), poll_seconds=0.01)
    await engine.pull(OTHER, 1)
    job = make_job("a", n0=0, n=20)
    await submit(engine, job)
    model = FakeModel(batch_rows=20)
    model.gate.clear()
    async with working(engine, {"default": model}, lease_seconds=3):
        await soon(lambda: bool(model.batches))
        for _ in range(8):
            await asyncio.sleep(0.5)
            assert await engine.pull(OTHER, 1) == []
        model.gate.set()
        await assert_exact(engine, job)
    assert len(model.batches) == 1


async def test_batches_and_shards_are_measured(engine: MemoryEngine) -> None:
    """Rows, padding, jobs a batch, and what became of the shards appear in the metrics."""
    names = {
        "vouchsafe_rows_total": {"task": "default"},
        "vouchsafe_batches_total": {"task": "default"},
        "vouchsafe_batch_rows_sum": {},
        "vouchsafe_batch_jobs_sum": {},
        "vouchsafe_batch_duration_seconds_count": {},
        "vouchsafe_padding_rows_total": {},
        "vouchsafe_shards_total": {"outcome": "committed"},
    }
    before = [metric(name, **labels) for name, labels in names.items()]
    job = make_job("a", n0=10, n=30)
    await submit(engine, job)
    async with working(engine, {"default": FakeModel(batch_rows=64)}):
        await assert_exact(engine, job)
    after = [metric(name, **labels) for name, labels in names.items()]
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown == [40, 1, 40, 1, 1, 24, 4]


@pytest.mark.parametrize(("level", "told"), [("DEBUG", 1), ("INFO", 0)])
async def test_a_batch_is_one_record_for_those_who_want_it(
    engine: MemoryEngine, caplog: pytest.LogCaptureFixture, level: str, told: int
) -> None:
    """A device batch leaves one record with its jobs and their traces at DEBUG, none above."""
    jobs = [replace(make_job("a"), traceparent=VALID), make_job("b")]
    await submit(engine, *jobs)
    with caplog.at_level(level, "vouchsafe.worker"):
        async with working(engine, {"default": FakeModel(batch_rows=80)}):
            await asyncio.gather(*(assert_exact(engine, job) for job in jobs))
    found = [vars(record) for record in caplog.records]
    names = ("job_id", "task_id", "trace_id")
    assert [[one[name] for name in names] for one in found] == told * [
        [["a", "b"], "default", TRACE]
    ]


async def test_a_failure_names_its_job_and_trace(
    engine: MemoryEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever looks for a job that failed finds each attempt, with its traceback."""
    job = replace(make_job("a", n0=0, n=10), traceparent=VALID)
    await submit(engine, job)
    async with working(engine, {"default": FakeModel(poison=keys(job))}):
        assert (await final(engine, "a")).state is State.FAILED
    found = [vars(record) for record in caplog.records if record.exc_info]
    assert {(one["job_id"], one["trace_id"]) for one in found} == {("a", TRACE)}
    assert len(found) == FAILURES_ALLOWED


# Slow batches


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


async def test_nothing_is_pulled_beside_a_batch_that_loads_networks(engine: MemoryEngine) -> None:
    """Other workers do what waits meanwhile, and then the first goes on."""
    spy, waiting, later = EngineSpy(engine), make_job("waiting"), make_job("later")
    async with slow_batch(spy, waiting) as (birds, cats):
        others = FakeModel()
        async with working(engine, {"default": others}, worker_id="other"):
            await assert_exact(engine, waiting)
        await soon(lambda: len(spy.asked("renew")) > 3)
        assert len(pulled(spy)) == 1
        assert (cats.batches, len(birds.batches)) == ([], 1)
        birds.gate.set()
        assert (await final(engine, "birds")).state is State.SUCCEEDED
        await submit(engine, later)
        await assert_exact(engine, later)
    assert sum(map(rows_in, others.batches)) == 40
    assert {key for batch in cats.batches for key, *_ in batch} == keys(later)
    assert spy.asked("release") == spy.asked("fail") == []


async def test_a_batch_that_turns_out_slow_ends_the_prefetch(engine: MemoryEngine) -> None:
    """What was pulled before is renewed and computed after it, and nothing more is pulled."""
    spy, first, second = EngineSpy(engine), make_job("first"), make_job("second", n=200)
    async with slow_batch(spy, first, is_loaded=True) as (birds, cats):
        await soon(lambda: len(pulled(spy)) == 2 and len(spy.asked("renew")) > 1)
        await submit(engine, second)
        renewals = len(spy.asked("renew"))
        await soon(lambda: len(spy.asked("renew")) > renewals + 3)
        assert pulled(spy) == [40, 40]
        renewed = {lease.job.id for lease in spy.asked("renew")[-1][0]}
        assert renewed == {"birds", "first"}
        assert len(await engine.pull(OTHER, 1_000)) == 21
        assert cats.batches == []
        birds.gate.set()
        await assert_exact(engine, first)
    assert spy.asked("fail") == []


async def test_nothing_is_pulled_beside_a_task_whose_last_batch_was_slow(
    engine: MemoryEngine,
) -> None:
    """How long the batch before it took decides."""
    spy, model, first = EngineSpy(engine), FakeModel(delay=0.1), make_job("first", n0=0, n=16)
    await submit(engine, first)
    async with working(spy, {"default": model}, lease_seconds=0.15):
        await assert_exact(engine, first)
        await soon(lambda: spy.calls[-1][0] == "pull")
        model.gate.clear()
        await submit(engine, make_job("second", n0=0, n=100))
        await soon(lambda: len(model.batches) == 2)
        left = await engine.pull(OTHER, 1_000)
        assert [lease.shard.index for lease in left] == list(range(2, 10))


async def test_worker_is_heard_of_while_a_batch_runs_long() -> None:
    """With its batch cancelled it still lives for the engine, and what is new is announced."""
    clock = FakeClock()
    engine = MemoryEngine(
        EngineOptions(shard_rows=10, worker_seconds=30), poll_seconds=0.01, clock=clock
    )
    await engine.pull(Worker("someone", {"birds": "bundle-b"}), 0)
    spy, models = EngineSpy(engine), {"default": FakeModel(batch_rows=40)}
    birds = models["birds"] = FakeModel(batch_rows=20, digest="bundle-b", is_loaded=False)
    birds.gate.clear()
    await submit(engine, make_job("birds", n0=0, n=20, task="birds", bundle="bundle-b"))
    async with working(spy, models, lease_seconds=0.15):
        await soon(lambda: len(spy.asked("renew")) > 1)
        models["fish"] = FakeModel(digest="bundle-c")
        await soon(lambda: spy.asked("pull")[-1][0].bundles.keys() == models.keys())
        await engine.cancel("birds")
        for _ in range(3):
            pulls = len(spy.asked("pull"))
            clock.advance(20)
            await soon(lambda: len(spy.asked("pull")) > pulls + 1)  # noqa: B023
        served = (await engine.capacity()).digests
        assert served == {"default": ("bundle-a",), "birds": ("bundle-b",), "fish": ("bundle-c",)}
        job = make_job("a")
        await submit(engine, job)
        assert len(birds.batches) == 1
        birds.gate.set()
        await assert_exact(engine, job)


async def test_stop_beside_a_slow_batch_leaves_nothing_held(engine: MemoryEngine) -> None:
    """Told to stop the worker counts the batch, and hands back what it had pulled beside it."""
    spy, birds = EngineSpy(engine), FakeModel(batch_rows=20, digest="bundle-b")
    birds.gate.clear()
    models = {"default": FakeModel(), "birds": birds}
    await submit(engine, make_job("birds", n0=0, n=20, task="birds", bundle="bundle-b"))
    await submit(engine, make_job("a", n0=0, n=20))
    async with working(spy, models, lease_seconds=0.15) as hall:
        await soon(lambda: bool(birds.batches) and len(spy.asked("renew")) > 1)
        hall.stop.set()
        birds.gate.set()
        await hall.ends()
        assert len(await engine.pull(OTHER, 1000)) == 2
    assert (await final(engine, "birds")).state is State.SUCCEEDED


async def test_a_shard_of_several_slow_batches_is_finished(engine: MemoryEngine) -> None:
    """However long its batches take, its worker keeps the shard until all are counted."""
    spy, job = EngineSpy(engine), make_job("a", n0=0, n=10)
    await submit(engine, job)
    async with working(spy, {"default": FakeModel(batch_rows=4, delay=0.2)}, lease_seconds=0.3):
        await assert_exact(engine, job)
    assert len(spy.asked("commit")) == 1


# Cancelling and stopping


async def test_cancelled_rows_leave_within_one_batch(engine: MemoryEngine) -> None:
    """Once a job is cancelled no batch after the current one holds a row of it."""
    model, gone, kept = FakeModel(), make_job("gone", n=60), make_job("kept", n=60)
    model.gate.clear()
    await submit(engine, gone, kept)
    async with working(engine, {"default": model}):
        await soon(lambda: bool(model.batches))
        await engine.cancel("gone")
        model.gate.set()
        await assert_exact(engine, kept)
    later = {key for batch in model.batches[1:] for key, *_ in batch}
    assert later == keys(kept)


async def test_stop_finishes_the_batch_and_hands_back_the_rest(engine: MemoryEngine) -> None:
    """On stop the batch in hand is counted, and everything else can be pulled at once."""
    model = FakeModel(batch_rows=20)
    model.gate.clear()
    await submit(engine, make_job("a", n0=0, n=100))
    async with working(engine, {"default": model}) as hall:
        await soon(lambda: bool(model.batches))
        hall.stop.set()
        await asyncio.sleep(0.05)
        assert not hall.task.done()
        model.gate.set()
        await hall.ends()
    assert len(model.batches) == 1
    status = await engine.status("a")
    assert status is not None
    assert status.rows_done == 20
    left = await engine.pull(OTHER, 1000)
    assert [lease.shard.index for lease in left] == list(range(2, 10))


async def test_commits_under_way_arrive_before_the_end(engine: MemoryEngine) -> None:
    """A worker told to stop returns only once the engine has taken its last votes."""

    class Slow(EngineSpy):
        async def commit(self, lease: Lease, counts: list[int]) -> bool:
            await asyncio.sleep(0.05)
            return await engine.commit(lease, counts)

    model = FakeModel(batch_rows=20)
    await submit(engine, make_job("a", n0=0, n=20))
    async with working(Slow(engine), {"default": model}) as hall:
        await soon(lambda: bool(model.batches))
        hall.stop.set()
        await hall.ends()
    status = await engine.status("a")
    assert status is not None
    assert status.state is State.SUCCEEDED


async def test_idle_worker_stops_at_once(engine: MemoryEngine) -> None:
    """A worker without work ends within a poll of being told."""
    async with working(engine, {"default": FakeModel()}) as hall:
        await asyncio.sleep(0.02)
        hall.stop.set()
        await hall.ends()


# Bad shards


async def test_only_the_culprit_fails(engine: MemoryEngine) -> None:
    """A is_poison job fails after its attempts; its companions are answered, without a failure."""
    culprit = make_job("culprit", mode=Mode.PREDICT, n=6)
    innocents = [make_job(f"job-{number}", mode=Mode.PREDICT, n=6) for number in range(5)]
    spy, model = EngineSpy(engine), FakeModel(poison=keys(culprit))
    await submit(engine, innocents[0], culprit, *innocents[1:])
    async with working(spy, {"default": model}):
        for job in innocents:
            await assert_exact(engine, job)
        status = await final(engine, "culprit")
    assert status.state is State.FAILED
    assert status.problem is not None
    assert (status.problem["job"], status.problem["status"]) == ("culprit", 500)
    assert [lease.job.id for lease, _ in spy.asked("fail")] == ["culprit"] * FAILURES_ALLOWED


async def test_isolated_shards_run_alone() -> None:
    """A shard that a worker died over shares its batch with nothing."""
    clock = FakeClock()
    engine = MemoryEngine(EngineOptions(shard_rows=10), poll_seconds=0.01, clock=clock)
    await engine.pull(OTHER, 1)
    suspect, other = make_job("suspect", n0=0, n=10), make_job("other", n0=0, n=60)
    await submit(engine, suspect)
    await engine.start(await engine.pull(OTHER, 1))
    clock.advance(31)
    await engine.pull(OTHER, 0)
    await submit(engine, other)
    model = FakeModel()
    async with working(engine, {"default": model}):
        await assert_exact(engine, suspect)
        await assert_exact(engine, other)
    batches = [b for b in model.batches if keys(suspect) & {key for key, *_ in b}]
    assert all({key for key, *_ in batch} <= keys(suspect) for batch in batches)


@pytest.mark.parametrize("wrong", [[[9, 0, 0]], [[6, 0]], [[6, 0, 0], [6, 0, 0]]], ids=str)
async def test_impossible_votes_are_failures(engine: MemoryEngine, wrong: list[list[int]]) -> None:
    """A model whose votes cannot be right fails the shard; the worker and the others go on."""

    class Wrong(FakeModel):
        def votes(self, parts: Any, digest: str) -> NDArray[np.int64]:
            right = super().votes(parts, digest)
            return np.array(wrong) if {part.key for part in parts} & keys(bad) else right

    bad, good = make_job("bad", mode=Mode.PREDICT, n=6), make_job("good")
    await submit(engine, bad)
    async with working(engine, {"default": Wrong()}):
        assert (await final(engine, "bad")).state is State.FAILED
        await submit(engine, good)
        await assert_exact(engine, good)


# Bad engines


@pytest.mark.parametrize("seed", range(3))
async def test_worker_survives_its_engine(seed: int) -> None:
    """With calls failing before and after they took effect, all jobs are still exact."""
    chance = random.Random(seed)
    engine = MemoryEngine(EngineOptions(shard_rows=10, lease_seconds=0.2), poll_seconds=0.01)
    spy = EngineSpy(engine, trouble=lambda: chance.random() < 0.1)
    await engine.pull(OTHER, 1)
    jobs = [make_job(f"job-{number}") for number in range(4)]
    await submit(engine, *jobs)
    async with working(spy, {"default": FakeModel()}, lease_seconds=0.2):
        for job in jobs:
            await assert_exact(engine, job)


async def test_rows_of_a_cancelled_job_are_not_computed(engine: MemoryEngine) -> None:
    """Rows in hand of a job that was cancelled are dropped at their batch, and no others."""
    spy, model = EngineSpy(engine), FakeModel(batch_rows=20)
    model.gate.clear()
    first, gone = make_job("first", n0=0, n=20), make_job("gone", n0=0, n=10)
    last = make_job("last", n0=0, n=10)
    await submit(engine, first, gone, last)
    async with working(spy, {"default": model}):
        await soon(lambda: len(model.batches) == 1 and len(spy.asked("pull")) == 2)
        await engine.cancel("gone")
        model.gate.set()
        await assert_exact(engine, last)
    assert not any(keys(gone) & {key for key, *_ in batch} for batch in model.batches)


async def test_young_leases_are_not_renewed(engine: MemoryEngine) -> None:
    """Batches that take no time cost no renewals: a lease is left alone for a third of its term."""
    spy = EngineSpy(engine)
    job = make_job("a", n=500)
    await submit(engine, job)
    async with working(spy, {"default": FakeModel()}):
        await assert_exact(engine, job)
    assert len(spy.asked("start")) > 10
    assert spy.asked("renew") == []


async def test_batch_that_could_not_be_started_is_tried_again(engine: MemoryEngine) -> None:
    """Rows packed for a batch are not lost where the engine fails before it is computed."""
    spy = EngineSpy(engine)
    spy.trouble = lambda: spy.calls[-1][0] == "start" and len(spy.asked("start")) == 1
    job = make_job("a")
    await submit(engine, job)
    async with working(spy, {"default": FakeModel()}):
        await assert_exact(engine, job)


async def test_worker_waits_for_an_engine_that_is_away(engine: MemoryEngine) -> None:
    """An engine that answers nothing for a while is asked again, not hammered."""
    spy = EngineSpy(engine, trouble=lambda: True)
    job = make_job("a")
    await submit(engine, job)
    async with working(spy, {"default": FakeModel()}):
        await asyncio.sleep(0.3)
        assert 2 <= len(spy.calls) <= 12
        spy.trouble = lambda: False
        await assert_exact(engine, job)


async def test_what_an_outage_kept_from_the_engine_is_counted(engine: MemoryEngine) -> None:
    """Shards whose votes, or whose hand-back, the engine never heard of are told as lost."""
    spy, connection = EngineSpy(engine), EngineConnection()
    await submit(engine, make_job("a"))
    leases = await engine.pull(Worker("alpha", {"default": "bundle-a"}), 1_000)
    before = metric("vouchsafe_shards_total", outcome="lost")
    spy.trouble = lambda: True
    connection.leave()
    reporter = Reporter(cast(Engine, spy), connection, 1.0)
    reporter.commit(leases[0], np.array([leases[0].shard.rows]))
    reporter.release(leases[1:])
    await reporter.finish(5.0, asyncio.create_task(asyncio.sleep(0)))
    assert metric("vouchsafe_shards_total", outcome="lost") == before + len(leases)


# Bad devices


async def test_hung_device_is_noticed(engine: MemoryEngine) -> None:
    """A batch past its limit makes the worker unhealthy; what it only held goes back at once."""
    model = FakeModel(batch_rows=20)
    model.gate.clear()
    await submit(engine, make_job("a", n0=0, n=60))
    async with working(engine, {"default": model}, lease_seconds=0.15, limit=0.1) as hall:
        assert hall.thread.healthy
        with pytest.raises(DeviceFailed):
            await hall.ends()
        assert not hall.thread.healthy
        left = await engine.pull(OTHER, 1000)
        assert [lease.shard.index for lease in left] == [2, 3, 4, 5]


async def test_broken_device_blames_no_job(engine: MemoryEngine) -> None:
    """A device that fails what it computed before ends the worker; no attempt is counted, and all
    but the batch over which it ends goes back at once."""
    spy, model, first = EngineSpy(engine), FakeModel(), make_job("first")
    await submit(engine, first)
    async with working(spy, {"default": model}) as hall:
        await assert_exact(engine, first)
        model.broken = True
        await submit(engine, make_job("second"))
        with pytest.raises(DeviceFailed):
            await hall.ends()
        assert not hall.thread.healthy
    assert spy.asked("fail") == []
    left = await engine.pull(OTHER, 1000)
    (started,) = spy.asked("start")[-1]
    assert {lease.job.id for lease in started} == {"second"}
    assert len(left) == 4 - len(started) >= 2


class Breaking(FakeModel):
    """A model whose device computes nothing any more after a batch with a key of `poison`."""

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        self.broken = self.broken or any(part.key in self.poison for part in parts)
        return super().votes(parts, digest)


async def test_a_device_that_breaks_at_its_first_batch_ends_the_worker(
    engine: MemoryEngine,
) -> None:
    """Networks compute as they are loaded, so that the self-test needs no batch before: no job
    fails by what such a device cannot do."""
    spy, bad = EngineSpy(engine), make_job("bad", mode=Mode.PREDICT, n=5)
    await submit(engine, bad, *(make_job(f"job-{number}") for number in range(20)))
    async with working(spy, {"default": Breaking(poison=keys(bad))}) as hall:
        with pytest.raises(DeviceFailed):
            await hall.ends()
        assert not hall.thread.healthy
    assert spy.asked("fail") == []


class Vanishing(FakeModel):
    """A model whose networks cannot be loaded any more once they are `gone`."""

    gone = False

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        if self.gone:
            raise ModelUnavailable("Task 'birds' cannot be loaded: a file is missing")
        return super().votes(parts, digest)


async def test_networks_that_cannot_be_loaded_fail_their_jobs_alone(engine: MemoryEngine) -> None:
    """Their jobs end with the reason, though they were computed before; all others are answered."""
    birds = Vanishing(digest="bundle-b")
    jobs = [make_job(f"job-{number}") for number in range(3)]
    first, second = (make_job(name, task="birds", bundle="bundle-b") for name in ("one", "two"))
    async with working(engine, {"default": FakeModel(), "birds": birds}) as hall:
        await submit(engine, first)
        await assert_exact(engine, first)
        birds.gone = True
        await submit(engine, second, *jobs)
        status = await final(engine, second.id)
        for job in jobs:
            await assert_exact(engine, job)
        assert hall.thread.healthy
    assert status.state is State.FAILED
    assert status.problem is not None
    assert status.problem["type"] == "urn:vouchsafe:problem:task-unusable"
    assert "a file is missing" in status.problem["detail"]


class Withheld(FakeModel):
    """A model whose networks cannot be loaded, and which is not announced for a while."""

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        self.is_available = False
        raise ModelUnavailable("Task 'default' cannot be loaded: a file is missing")


async def test_networks_that_cannot_be_loaded_count_one_attempt(engine: MemoryEngine) -> None:
    """Only the batch for which they were tried fails; the rest goes back, and nothing of the task
    is taken until it is announced again: workers that can load them finish the job."""
    spy, model, job = EngineSpy(engine), Withheld(batch_rows=20), make_job("a", n0=20, n=60)
    await submit(engine, job)
    async with working(spy, {"default": model}) as hall:
        await soon(lambda: len(spy.asked("fail")) == 2)
        await soon(lambda: spy.asked("pull")[-1][0].bundles == {})
        assert len(await others_hold(engine, 8)) == 8
        assert len(spy.asked("fail")) == 2
        model.is_available = True
        await soon(lambda: spy.asked("pull")[-1][0].bundles != {})
        assert hall.thread.healthy


async def test_a_task_that_is_withheld_during_a_pull_goes_back(engine: MemoryEngine) -> None:
    """What comes for it then is handed back uncounted."""
    model = Withheld()

    class Withholding(EngineSpy):
        async def pull(self, *arguments: Any) -> list[Lease]:
            leases = await self.engine.pull(*arguments)
            model.is_available = False
            return leases

    spy = Withholding(engine)
    await submit(engine, make_job("a"))
    async with working(spy, {"default": model}):
        assert len(await others_hold(engine, 4)) == 4
    assert spy.asked("fail") == []


async def test_a_job_of_other_classes_is_refused(engine: MemoryEngine) -> None:
    """It fails by itself, computed nowhere, and what is in hand beside it is counted."""
    model, good, odd = FakeModel(), make_job("good"), make_job("odd", classes=4)
    await submit(engine, odd, good)
    async with working(engine, {"default": model}):
        await assert_exact(engine, good)
        assert (await final(engine, "odd")).state is State.FAILED
    assert not any({key for key, *_ in batch} & keys(odd) for batch in model.batches)


class Ending(FakeModel):
    """A model whose networks end the process, at once or `after` so many batches."""

    after = 0

    def votes(self, parts: Iterable[Any], digest: str) -> NDArray[np.int64]:
        if len(self.batches) >= self.after:
            raise DeviceFailed("the same rows got two answers")
        return super().votes(parts, digest)


async def test_a_worker_that_ends_leaves_its_jobs_to_others(engine: MemoryEngine) -> None:
    """A worker whose networks cannot be had any more ends, and another finishes every job: an
    attempt is counted against the batch in hand alone, and nothing waits for a lease to run out."""
    spy, jobs = EngineSpy(engine), [make_job(f"job-{number}") for number in range(20)]
    await submit(engine, *jobs)
    async with working(spy, {"default": Ending()}) as hall:
        with pytest.raises(DeviceFailed):
            await hall.ends()
    [(started,)] = spy.asked("start")
    assert [lease for lease, _ in spy.asked("fail")] == started
    leases = await engine.pull(OTHER, 10_000)
    assert len(leases) == 80
    assert not any(lease.isolated for lease in leases)
    await engine.release(leases)
    async with working(engine, {"default": FakeModel()}):
        for job in jobs:
            await assert_exact(engine, job)


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


async def test_a_failed_batch_is_let_go_of_before_the_self_test(engine: MemoryEngine) -> None:
    """The device has room for the next call, whatever held on to the batch that failed."""
    bad = make_job("bad", mode=Mode.PREDICT, n=5)
    model = Holding(poison=keys(bad))
    await submit(engine, make_job("fine", mode=Mode.PREDICT, n=5))
    async with working(engine, {"default": model}):
        await final(engine, "fine")
        await submit(engine, bad)
        assert (await final(engine, "bad")).state is State.FAILED
    assert len(model.alive) == 1 + 2 * FAILURES_ALLOWED
    assert set(model.alive) == {0}


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """Each engine, of a worker that serves the default task."""
    built = HARNESSES[request.param](request)
    await built.engine.pull(OTHER, 1)
    yield built
    await built.close()


@pytest.fixture
def either(harness: Harness) -> Engine:
    return harness.engine


async def test_a_job_that_breaks_its_devices_fails_within_the_bound(harness: Harness) -> None:
    """One worker after the other ends over it, and each death counts once its leases run out: it
    runs alone after the first, and what was beside it is answered."""
    engine, poison = harness.engine, make_job("poison", mode=Mode.PREDICT, n=5)
    beside = [make_job(f"job-{number}", mode=Mode.PREDICT, n=5) for number in range(4)]
    await submit(engine, poison, *beside)
    for death in range(1 + ISOLATED_CRASHES_ALLOWED):
        status = await engine.status("poison")
        assert status is not None
        assert not status.state.ended
        spy, model = EngineSpy(engine), Breaking(poison=keys(poison))
        async with working(spy, {"default": model}, worker_id=f"w{death}") as hall:
            with pytest.raises(DeviceFailed):
                await hall.ends()
        assert spy.asked("fail") == []
        await harness.wait(LEASE + 1)
    async with working(engine, {"default": FakeModel()}):
        status = await final(engine, "poison")
        for job in beside:
            await assert_exact(engine, job)
    assert status.state is State.FAILED
    assert status.problem is not None
    assert "crashed 6 times on the same rows" in status.problem["detail"]


async def test_a_job_that_ends_its_workers_fails_within_the_bound(either: Engine) -> None:
    """One worker after the other ends over it and hands back what it holds, each with a healthy
    thread; none more than its attempts are."""
    await submit(either, make_job("poison", n0=5, n=5))
    for attempt in range(FAILURES_ALLOWED):
        status = await either.status("poison")
        assert status is not None
        assert not status.state.ended
        async with working(either, {"default": Ending()}, worker_id=f"w{attempt}") as hall:
            with pytest.raises(DeviceFailed):
                await hall.ends()
    status = await final(either, "poison")
    assert status.state is State.FAILED
    assert status.problem is not None
    assert status.problem["type"] == "urn:vouchsafe:problem:shard-dead"


async def test_a_batch_whose_self_test_ends_the_worker_counts_an_attempt(
    engine: MemoryEngine,
) -> None:
    """Also where it was not the batch itself that ended it."""
    spy, bad = EngineSpy(engine), make_job("bad", mode=Mode.PREDICT, n=5)
    model = Ending(poison=keys(bad))
    model.after = 2
    await submit(engine, make_job("fine", mode=Mode.PREDICT, n=5))
    async with working(spy, {"default": model}) as hall:
        await final(engine, "fine")
        await submit(engine, bad)
        with pytest.raises(DeviceFailed):
            await hall.ends()
    assert [lease.job.id for lease, _ in spy.asked("fail")] == ["bad"]


async def test_thread_is_healthy_between_calls() -> None:
    """Only a call that runs too long is ill; waiting for work, or a call that raised, is not."""
    thread = ComputeThread(batch_seconds_limit=0.05)
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    await asyncio.sleep(0.1)
    assert thread.healthy
    assert await thread.run(max, 1, 2) == 2
    thread.close()
