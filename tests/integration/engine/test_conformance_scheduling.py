"""The engine's contract: priorities, ends, watching, figures."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Engine,
    PriorityState,
    Worker,
)
from service.jobs import JobStatus, Mode, State
from tests.support.engines import (
    ALPHA,
    BETA,
    BOTH,
    LEASE,
    PROBLEM,
    RETENTION,
    SHARD_ROWS,
    STARVATION,
    WORKER_SILENCE,
    Harness,
    assert_exact,
    compute,
    die,
    finish_everything,
    one_shard,
    soon,
    status_of,
    watched,
)
from tests.support.fakes import make_job

# Lanes and tasks


async def test_wrong_bundle_is_never_pulled(engine: Engine) -> None:
    """A worker whose numerics changed gets no shard of a job asked under the old ones."""
    await engine.submit(make_job("a"))
    assert await engine.pull(Worker("gamma", {"default": "bundle-new"}), 100) == []
    assert await engine.pull(Worker("delta", {}), 100) == []
    assert len(await engine.pull(ALPHA, 100)) == 4


async def test_every_lease_has_a_token_of_its_own(engine: Engine) -> None:
    """Jobs of either lane that come in the same moment share a worker, but never a token."""
    await engine.pull(ALPHA, 1)
    jobs = [
        make_job(f"{mode.value}-{at}", mode=mode, n=20)
        for at in range(6)
        for mode in (Mode.CERTIFY, Mode.PREDICT)
    ]
    await asyncio.gather(*map(engine.submit, jobs))
    leases = []
    while found := await engine.pull(ALPHA, 50):
        leases += found
    rows = sum(lease.shard.rows for lease in leases)
    assert rows == sum(job.rows for job in jobs)
    assert len({lease.token for lease in leases}) == len(leases)


async def test_fast_lane_goes_first(engine: Engine) -> None:
    """A PREDICT job overtakes CERTIFY jobs of its task; within a lane the older goes first."""
    await engine.submit(make_job("slow", n0=0, n=SHARD_ROWS))
    await engine.submit(one_shard("fast-1"))
    await engine.submit(one_shard("fast-2"))
    leases = await engine.pull(ALPHA, 100)
    assert [lease.job.id for lease in leases] == ["fast-1", "fast-2", "slow"]


async def test_fast_lane_leaves_a_quarter(engine: Engine) -> None:
    """However much PREDICT comes, every fourth pull of a task begins with its CERTIFY."""
    await engine.submit(make_job("slow", n0=0, n=3 * SHARD_ROWS))
    served = []
    for at in range(12):
        await engine.submit(one_shard(f"fast-{at}"))
        (lease,) = await engine.pull(ALPHA, 1)
        served.append(lease.job.id[:4])
    assert served == 3 * ["fast", "fast", "fast", "slow"]


async def test_slow_lane_saves_no_turns(engine: Engine) -> None:
    """A CERTIFY job that comes late waits for three pulls; one just served, for three more."""
    for at in range(4):
        await engine.submit(one_shard(f"fast-{at}"))
    for _ in range(4):
        await engine.pull(ALPHA, 1)
    await engine.submit(make_job("slow", n0=0, n=2 * SHARD_ROWS))
    (lease,) = await engine.pull(ALPHA, 1)
    assert lease.job.id == "slow"
    for at in range(4, 8):
        await engine.submit(one_shard(f"fast-{at}"))
    pulls = [await engine.pull(ALPHA, 1) for _ in range(5)]
    assert [lease.job.id for (lease,) in pulls] == ["fast-4", "fast-5", "fast-6", "slow", "fast-7"]


async def test_shards_put_back_keep_their_place(engine: Engine) -> None:
    """A shard handed back goes before younger jobs, not behind them."""
    await engine.submit(one_shard("a"))
    await engine.submit(one_shard("b"))
    (lease,) = await engine.pull(ALPHA, 1)
    await engine.release([lease])
    assert [lease.job.id for lease in await engine.pull(ALPHA, 100)] == ["a", "b"]


async def test_a_pull_is_of_one_task(engine: Engine) -> None:
    """Shards of two tasks never come in one pull."""
    await engine.submit(one_shard("a"))
    await engine.submit(one_shard("b", task="birds", bundle="bundle-b"))
    pulls = [await engine.pull(BOTH, 100), await engine.pull(BOTH, 100)]
    assert sorted([lease.job.id for lease in pull] for pull in pulls) == [["a"], ["b"]]


async def test_preferred_task_goes_first(harness: Harness) -> None:
    """The task that a worker prefers is served before an older job of another."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    await harness.wait(1)
    await engine.submit(one_shard("b", task="birds", bundle="bundle-b"))
    (lease,) = await engine.pull(BOTH, 1, prefer_task="birds")
    assert lease.job.id == "b"


async def test_preference_falls_back_to_what_there_is(engine: Engine) -> None:
    """A preferred task without work does not keep a worker idle."""
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(BOTH, 1, prefer_task="birds")
    assert lease.job.id == "a"


async def test_preference_starves_nobody(harness: Harness) -> None:
    """Under a steady load of the preferred task the other is served within its bound, and back."""
    engine = harness.engine
    await engine.submit(make_job("a", n=190))
    await engine.submit(make_job("b", n=190, task="birds", bundle="bundle-b"))
    served = []
    for _ in range(3 * (STARVATION + 2)):
        (lease,) = await engine.pull(BOTH, 1, prefer_task="default")
        await compute(engine, [lease])
        served.append(lease.job.id)
        await harness.wait(1)
    gaps = [len(gap) for gap in "".join(served).split("b")]
    assert max(gaps) <= STARVATION + 1
    assert served.count("a") > served.count("b") > 1


# Ends


async def test_cancel_drops_what_is_left(engine: Engine) -> None:
    """A cancelled job hands out nothing more, and its holders learn it at the next renewal."""
    await engine.submit(make_job("a"))
    await engine.submit(make_job("b"))
    leases = await engine.pull(ALPHA, 60)
    assert await engine.cancel("a") is True
    assert {lease.job.id for lease in await engine.renew(leases)} == {"b"}
    assert {lease.job.id for lease in await engine.pull(BETA, 100)} == {"b"}
    status = await status_of(engine, "a")
    assert status.state is State.CANCELLED
    assert status.finished is not None
    assert (await engine.capacity()).backlog_rows == 40


async def test_ended_jobs_cannot_be_cancelled(engine: Engine) -> None:
    """Cancelling twice, or after success, changes nothing."""
    await engine.submit(make_job("a"))
    await engine.submit(make_job("b"))
    await engine.cancel("a")
    await finish_everything(engine)
    assert (await engine.cancel("a"), await engine.cancel("b")) == (False, False)
    assert_exact(await status_of(engine, "b"))


@pytest.mark.parametrize("stage", ["queued", "leased", "running", "ended"])
async def test_forget_erases_everything(harness: Harness, stage: str) -> None:
    """After forget no trace is left: no status, no image, no noise key, no Idempotency-Key."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job, idempotency_key="once")
    leases = await engine.pull(ALPHA, 100) if stage != "queued" else []
    if stage in ("running", "ended"):
        await engine.start(leases)
    if stage == "ended":
        await compute(engine, leases)
    assert await harness.stores(job.pixels) is (stage != "ended")
    assert await harness.stores(job.key)
    assert await engine.delete("a") is True
    assert await engine.delete("a") is False
    assert await engine.status("a") is None
    assert await engine.renew(leases) == []
    assert await engine.pull(ALPHA, 100) == []
    assert not await harness.stores(job.pixels)
    assert not await harness.stores(job.key)
    assert await engine.submit(make_job("b"), idempotency_key="once") == "b"


async def test_finished_jobs_vanish_after_the_retention(harness: Harness) -> None:
    """An ended job is kept for the retention and then erased, image, key and all."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job, idempotency_key="once")
    await finish_everything(engine)
    await harness.wait(RETENTION * 0.9)
    assert_exact(await status_of(engine, "a"))
    await harness.wait(RETENTION * 0.2)
    assert await engine.status("a") is None
    assert not await harness.stores(job.pixels)
    await engine.pull(ALPHA, 1)
    assert await engine.submit(make_job("b"), idempotency_key="once") == "b"


async def test_unfinished_jobs_vanish_too(harness: Harness) -> None:
    """A job that nobody computes does not keep its image beyond the retention."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job)
    await harness.wait(RETENTION + 1)
    assert await engine.status("a") is None
    assert not await harness.stores(job.pixels)
    assert (await engine.capacity()).backlog_rows == 0


# Watching


async def test_watch_shows_every_change_to_a_fast_reader(engine: Engine) -> None:
    """Rows done only grow, and the last status watched is the final one."""
    await engine.submit(make_job("a"))
    seen: list[JobStatus] = []
    watching = asyncio.create_task(watched(engine, "a", seen))
    await soon(lambda: len(seen) == 1)
    for done, lease in enumerate(await engine.pull(ALPHA, 100), start=1):
        await compute(engine, [lease])
        await soon(lambda done=done: seen[-1].rows_done == 10 * done)
    await watching
    assert seen[0].state is State.QUEUED
    assert [s.rows_done for s in seen] == sorted(s.rows_done for s in seen)
    assert_exact(seen[-1])


async def test_slow_watcher_sees_the_latest(engine: Engine) -> None:
    """Changes between two looks are one change: nothing piles up for a slow reader."""
    await engine.submit(make_job("a"))
    async with aclosing(engine.watch("a")) as watching:
        assert (await anext(watching)).rows_done == 0
        await compute(engine, (await engine.pull(ALPHA, 100))[:3])
        assert (await anext(watching)).rows_done == 30


async def test_watch_of_an_ended_job_is_its_end(engine: Engine) -> None:
    """A watch that begins after the end yields the one final status."""
    await engine.submit(make_job("a"))
    await finish_everything(engine)
    (status,) = [status async for status in engine.watch("a")]
    assert_exact(status)


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_watchers_see_a_job_dropped(engine: Engine, end: str) -> None:
    """All watchers of a job that is cancelled or forgotten see it cancelled, and end."""
    await engine.submit(make_job("a"))
    seen: list[list[JobStatus]] = [[], []]
    watching = [asyncio.create_task(watched(engine, "a", into)) for into in seen]
    await soon(lambda: all(seen))
    await (engine.cancel("a") if end == "cancel" else engine.delete("a"))
    async with asyncio.timeout(30):
        await asyncio.gather(*watching)
    assert [into[-1].state for into in seen] == [State.CANCELLED] * 2


async def test_watchers_see_a_death_through_others_pulls(harness: Harness) -> None:
    """A job that dies of expired leases ends for its watchers as soon as any worker pulls."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    seen: list[JobStatus] = []
    watching = asyncio.create_task(watched(engine, "a", seen))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        await die(harness)
    await engine.pull(BETA, 1)
    async with asyncio.timeout(30):
        await watching
    assert seen[-1].state is State.FAILED


# What operators watch


async def test_an_idle_queue_says_so(engine: Engine) -> None:
    """Without work no lane has rows or an age, and no speed has been measured."""
    queue = await engine.stats()
    assert queue.priorities == {"hi": PriorityState(0, 0.0), "lo": PriorityState(0, 0.0)}
    assert (queue.rows_per_second, queue.dead_letters) == (0.0, 0)


async def test_the_queue_is_told_by_lane(harness: Harness) -> None:
    """Rows wait or are leased; ages are those of what nobody holds, since it was accepted."""
    engine, tick = harness.engine, harness.tick

    async def told() -> list[tuple[int, float]]:
        lanes = (await engine.stats()).priorities
        return [(lanes[name].rows, lanes[name].oldest_seconds) for name in ("hi", "lo")]

    await engine.submit(make_job("slow"))
    await harness.wait(3)
    await engine.submit(make_job("fast", mode=Mode.PREDICT))
    await harness.wait(2)
    await engine.submit(make_job("young", task="birds", bundle="bundle-b"))
    assert await told() == [(30, pytest.approx(2 * tick)), (80, pytest.approx(5 * tick))]

    fast = await engine.pull(ALPHA, 30)
    assert await told() == [(30, 0.0), (80, pytest.approx(5 * tick))]
    await engine.release(fast[:1])
    assert await told() == [(30, pytest.approx(2 * tick)), (80, pytest.approx(5 * tick))]
    fast += await engine.pull(ALPHA, 10)
    assert (await compute(engine, fast)).count(True) == 3
    assert await told() == [(0, 0.0), (80, pytest.approx(5 * tick))]

    slow = await engine.pull(ALPHA, 40)
    await harness.wait(1)
    assert await told() == [(0, 0.0), (80, pytest.approx(1 * tick))]
    await engine.cancel("young")
    assert await told() == [(0, 0.0), (40, 0.0)]
    await engine.start(slow)
    await harness.wait(LEASE + 1)
    assert await told() == [(0, 0.0), (40, pytest.approx((LEASE + 7) * tick))]
    await engine.delete("slow")
    assert await told() == [(0, 0.0), (0, 0.0)]


async def test_the_queue_tells_the_speed_that_retry_after_is_made_from(harness: Harness) -> None:
    """Capacity has the measured speed."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 20)
    await harness.wait(2)
    await compute(engine, leases)
    speed = (await engine.stats()).rows_per_second
    assert speed == (await engine.capacity()).rows_per_second > 0


async def test_workers_are_alive_until_they_fall_silent(harness: Harness) -> None:
    """A worker is counted while it is heard from, whatever it serves and however many times."""
    engine = harness.engine
    for _ in range(2):
        await engine.pull(BETA, 1)
    assert (await engine.stats()).workers == 3
    await harness.wait(WORKER_SILENCE - 5)
    await engine.pull(BETA, 1)
    await harness.wait(10)
    assert (await engine.stats()).workers == 1
    await harness.wait(WORKER_SILENCE)
    assert (await engine.stats()).workers == 0


async def test_shards_that_end_their_jobs_are_counted(harness: Harness) -> None:
    """By their failures or the deaths of their workers; what ends otherwise is no dead letter."""
    engine = harness.engine
    for name in ("failing", "good", "cancelled"):
        await engine.submit(one_shard(name))
        if name == "failing":
            for told in range(FAILURES_ALLOWED):
                assert (await engine.stats()).dead_letters == 0, told
                (lease,) = await engine.pull(ALPHA, 1)
                await engine.fail(lease, PROBLEM)
            assert (await engine.stats()).dead_letters == 1
    await engine.cancel("cancelled")
    await finish_everything(engine)
    assert (await engine.stats()).dead_letters == 1
    await engine.submit(one_shard("deadly"))
    for _ in range(1 + ISOLATED_CRASHES_ALLOWED):
        await die(harness)
    assert (await engine.stats()).dead_letters == 2
