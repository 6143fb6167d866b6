"""service/worker/loop.py: bad shards, engines that fail, devices that break."""

from __future__ import annotations

import asyncio
import random
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

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
from service.jobs import Mode, State
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.reporter import Reporter
from tests.support.engines import LEASE, Harness
from tests.support.fakes import EngineSpy, FakeClock, FakeModel, make_job
from tests.support.working import (
    OTHER,
    Breaking,
    Ending,
    Holding,
    Vanishing,
    Withheld,
    assert_exact,
    final,
    keys,
    metric,
    others_hold,
    soon,
    submit,
    working,
)

# Bad shards


async def test_only_the_culprit_fails(engine: MemoryEngine) -> None:
    """A poison job fails after its attempts; its companions are answered, without a failure."""
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
