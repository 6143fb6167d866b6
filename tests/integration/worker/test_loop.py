"""service/worker/loop.py: the loop between an engine and a device, in good and in bad times."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import (
    FAILURES_ALLOWED,
    Lease,
    Worker,
)
from service.jobs import Mode, State
from service.operations import metrics
from tests.support.fakes import EngineSpy, FakeClock, FakeModel, make_job
from tests.support.http import TRACE, VALID
from tests.support.working import (
    OTHER,
    Lowering,
    assert_exact,
    final,
    keys,
    metric,
    others_hold,
    pulled,
    rows_in,
    served,
    slow_batch,
    soon,
    submit,
    working,
)

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
        async def commit(self, lease: Lease, counts: list[int], result: bytes) -> bool:
            await asyncio.sleep(0.05)
            return await engine.commit(lease, counts, result)

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
