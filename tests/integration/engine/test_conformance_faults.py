"""The engine's contract under faults: poison, dead workers, jobs that no worker serves."""

from __future__ import annotations

import random

import pytest

from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Engine,
    Lease,
)
from service.jobs import Mode, State
from tests.support.engines import (
    ALPHA,
    BETA,
    BOTH,
    LEASE,
    NEWER,
    PROBLEM,
    Harness,
    assert_exact,
    compute,
    die,
    finish_everything,
    one_shard,
    open_rows,
    status_of,
    votes,
)
from tests.support.fakes import make_job

# Poison


async def test_third_failure_ends_the_job(engine: Engine) -> None:
    """A shard may fail twice; the third report ends its job with the problem reported."""
    await engine.submit(make_job("a"))
    for attempt in range(FAILURES_ALLOWED):
        assert not (await status_of(engine, "a")).state.ended, attempt
        (lease,) = await engine.pull(ALPHA, 1)
        await engine.start([lease])
        await engine.fail(lease, PROBLEM)
    status = await status_of(engine, "a")
    assert (status.state, status.problem) == (State.FAILED, PROBLEM)
    assert status.finished is not None
    assert await engine.pull(ALPHA, 100) == []
    assert (await engine.capacity()).backlog_rows == 0


async def test_failures_are_counted_by_shard(engine: Engine) -> None:
    """Two failures of each of several shards end nothing."""
    await engine.submit(make_job("a"))
    for _ in range(FAILURES_ALLOWED - 1):
        for lease in await engine.pull(ALPHA, 100):
            await engine.fail(lease, PROBLEM)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_one_report_counts_once(engine: Engine) -> None:
    """The same failure reported again and again is one failure."""
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    for _ in range(FAILURES_ALLOWED):
        await engine.fail(lease, PROBLEM)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_prefetched_shards_do_not_die(harness: Harness) -> None:
    """A lease that runs out without `start` counts neither as a death nor as a failure."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    for _ in range(FAILURES_ALLOWED + ISOLATED_CRASHES_ALLOWED + 2):
        (lease,) = await engine.pull(ALPHA, 1)
        assert not lease.isolated
        await harness.wait(LEASE + 1)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


@pytest.mark.parametrize("deadly", [0, 2])
async def test_after_a_death_a_shard_runs_alone(harness: Harness, deadly: int) -> None:
    """A shard that a worker died over is isolated from then on, and pulled by itself."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    others = await engine.pull(ALPHA, 100)
    dead = others.pop(deadly)
    await engine.start([dead])
    await harness.wait(LEASE + 1)
    pulls = [await engine.pull(BETA, 100), await engine.pull(BETA, 100)]
    (alone,) = next(pull for pull in pulls if len(pull) == 1)
    (*together,) = next(pull for pull in pulls if len(pull) == len(others))
    assert (alone.shard, alone.isolated) == (dead.shard, True)
    assert [lease.shard for lease in together] == [lease.shard for lease in others]
    assert not any(lease.isolated for lease in together)
    await compute(engine, [alone, *together])
    assert_exact(await status_of(engine, "a"))


async def test_every_shard_of_a_deadly_batch_runs_alone(harness: Harness) -> None:
    """When a worker dies over a batch all its shards are suspects, and none is dead yet."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    await engine.start(await engine.pull(ALPHA, 100))
    await harness.wait(LEASE + 1)
    for _ in range(4):
        (lease,) = await engine.pull(BETA, 100)
        assert lease.isolated
        await compute(engine, [lease])
    assert_exact(await status_of(engine, "a"))


async def test_fifth_isolated_death_ends_the_job(harness: Harness) -> None:
    """One death in company and four alone are survived; the fifth alone ends the job."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        assert not (await status_of(engine, "a")).state.ended
        assert len(await die(harness)) == 1
    status = await status_of(engine, "a")
    assert status.state is State.FAILED
    assert status.problem is not None
    assert status.problem["type"] == "urn:vouchsafe:problem:shard-dead"
    assert (status.problem["job"], status.problem["status"]) == ("a", 500)
    assert await engine.pull(BETA, 100) == []


async def test_shard_survives_the_deaths_allowed(harness: Harness) -> None:
    """A shard that is computed after its last allowed death is counted like any other."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    for _ in range(ISOLATED_CRASHES_ALLOWED):
        await die(harness)
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_innocent_jobs_finish_beside_a_poisonous_one(harness: Harness) -> None:
    """A job that kills every worker ends by itself, and all others are answered exactly."""
    engine = harness.engine
    for identity in ("a", "poison", "b"):
        await engine.submit(make_job(identity))
    while (await engine.capacity()).backlog_rows:
        leases = await engine.pull(ALPHA, 20)
        await engine.start(leases)
        if any(lease.job.id == "poison" for lease in leases):
            await harness.wait(LEASE + 1)
        else:
            await compute(engine, leases)
    assert (await status_of(engine, "poison")).state is State.FAILED
    assert_exact(await status_of(engine, "a"))
    assert_exact(await status_of(engine, "b"))


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(5, 40))]
)
async def test_counts_are_exact_under_injected_faults(harness: Harness, seed: int) -> None:
    """Deaths, failures, releases, double and late commits in any order never change a vote."""
    chance, engine = random.Random(seed), harness.engine
    modes = [Mode.CERTIFY, Mode.CERTIFY, Mode.PREDICT]
    jobs = [
        make_job(f"job-{number}", mode=modes[number % 3], owner="ada" if number < 3 else None)
        for number in range(8)
    ]
    lanes = {lane: [job for job in jobs if job.mode.priority == lane] for lane in ("hi", "lo")}
    for job in jobs:
        await engine.submit(job)
    forgotten: list[Lease] = []
    for _ in range(800):
        leases = await engine.pull(chance.choice([ALPHA, BETA]), chance.randrange(1, 40))
        await engine.start([lease for lease in leases if chance.random() < 0.3])
        for lease in leases:
            match chance.choices(["commit", "twice", "late", "fail", "release"], [6, 2, 2, 0.2, 1]):
                case ["commit"]:
                    await engine.commit(lease, votes(lease))
                case ["twice"]:
                    assert not (await compute(engine, [lease, lease]))[1]
                case ["late"]:
                    forgotten.append(lease)
                case ["fail"]:
                    await engine.fail(lease, PROBLEM)
                case ["release"]:
                    await engine.release([lease])
        if chance.random() < 0.1:
            await harness.wait(LEASE + 1)
        if forgotten and chance.random() < 0.3:
            late = forgotten.pop(chance.randrange(len(forgotten)))
            await engine.commit(late, votes(late))
        capacity = await engine.capacity("ada")
        assert capacity.owner_rows == await open_rows(engine, jobs[:3])
        assert capacity.backlog_rows == await open_rows(engine, jobs)
        queue = await engine.stats()
        for lane, its_own in lanes.items():
            assert queue.priorities[lane].rows == await open_rows(engine, its_own)
        if capacity.backlog_rows == 0:
            break
    statuses = [await status_of(engine, job.id) for job in jobs]
    failed = [status for status in statuses if status.state is State.FAILED]
    for status in statuses:
        if status not in failed:
            assert_exact(status)
    assert (await engine.stats()).dead_letters == len(failed)


# Jobs of no worker


async def test_jobs_that_no_worker_serves_any_more_fail(harness: Harness) -> None:
    """After five minutes in which only other digests were announced, with a problem that says so;
    their rows leave the backlog, and jobs of the other digest are computed."""
    engine = harness.engine
    await engine.submit(make_job("old", owner="ada"))
    await engine.pull(NEWER, 0)
    await engine.submit(make_job("new", bundle="bundle-n"))
    await harness.look(ALPHA, NEWER, ticks=600)
    assert (await status_of(engine, "old")).state is State.QUEUED
    await harness.look(NEWER, ticks=280)
    assert (await status_of(engine, "old")).state is State.QUEUED
    await harness.look(NEWER, ticks=100)
    status = await status_of(engine, "old")
    assert status.state is State.FAILED
    assert status.problem is not None
    assert status.problem["job"] == "old"
    assert "ask again" in status.problem["detail"]
    capacity = await engine.capacity("ada")
    assert (capacity.backlog_rows, capacity.owner_rows) == (40, 0)
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "new"))


async def test_a_digest_that_comes_back_keeps_its_jobs(harness: Harness) -> None:
    """Where its own workers are away for less than five minutes, or all workers for longer."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    await harness.look(NEWER, ticks=240)
    await engine.pull(ALPHA, 0)
    await harness.look(NEWER, ticks=200)
    await harness.look(ticks=320)
    await harness.look(NEWER, ticks=200)
    await engine.pull(ALPHA, 0)
    await finish_everything(engine, ALPHA)
    assert_exact(await status_of(engine, "a"))


async def test_a_pull_of_no_rows_only_announces(engine: Engine) -> None:
    """It takes nothing, whatever waits, in one line or in several, and keeps the worker alive."""
    jobs = [make_job("a"), make_job("b", task="birds", bundle="bundle-b")]
    await engine.pull(BOTH, 0)
    for job in jobs:
        await engine.submit(job)
        assert await engine.pull(BOTH, 0) == []
    assert (await engine.capacity()).digests["birds"] == ("bundle-b",)
    assert len(await engine.pull(BOTH, 1_000)) == 4
