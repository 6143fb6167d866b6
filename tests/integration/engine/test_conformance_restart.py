"""The engine's contract where a job begins anew under another digest; run on every implementation.

Alpha and beta serve the digest that the jobs come under, `newer` another of the same task.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from service.engine.protocol import FAILURES_ALLOWED, SOLITARY_DEATHS_ALLOWED, Engine, Worker
from service.errors import Backlog, IdempotencyMismatch, QuotaExceeded
from service.jobs import Domain, JobStatus, Mode, State
from tests.integration.engine.test_conformance import (
    ALPHA,
    BACKLOG_ROWS,
    BETA,
    HARNESSES,
    LEASE,
    NEWER,
    OWNER_ROWS,
    PROBLEM,
    RETENTION,
    Harness,
    assert_exact,
    compute,
    die,
    finish_everything,
    one_shard,
    soon,
    status_of,
    votes,
    watched,
)
from tests.support.fakes import make_job, true_votes

NEW = "bundle-n"
KEY = b"new key".ljust(32, b"n")


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A fresh engine with the workers `alpha` and `newer` alive."""
    built = HARNESSES[request.param](request)
    await built.engine.pull(ALPHA, 1)
    await built.engine.pull(NEWER, 1)
    yield built
    await built.close()


@pytest.fixture
def engine(harness: Harness) -> Engine:
    return harness.engine


async def books(engine: Engine, owner: str) -> tuple[int, int, int, int]:
    """The rows of everyone, of the owner, and of the lanes `hi` and `lo`."""
    capacity, lanes = await engine.capacity(owner), (await engine.queue()).lanes
    return capacity.backlog_rows, capacity.owner_rows, lanes["hi"].rows, lanes["lo"].rows


# What begins anew


@pytest.mark.parametrize("mode", Mode)
async def test_a_job_begins_anew_under_another_digest(engine: Engine, mode: Mode) -> None:
    """Nothing is counted, every shard waits for workers of that digest, and rows have its key."""
    job = make_job("a", mode=mode, owner="ada")
    await engine.submit(job)
    await compute(engine, await engine.pull(ALPHA, 20))
    before = await status_of(engine, "a")
    assert (before.state, before.rows_done) == (State.RUNNING, 20)
    assert await engine.restart("a", NEW, KEY) is True
    status = await status_of(engine, "a")
    assert status == JobStatus(
        replace(before.job, bundle=NEW, key=KEY), State.QUEUED, 0, (0, 0, 0), (0, 0, 0)
    )
    assert await engine.pull(ALPHA, 100) == []
    leases = await engine.pull(NEWER, 100)
    assert [lease.shard for lease in leases] == list(job.shards(10))
    assert {lease.job for lease in leases} == {replace(job, bundle=NEW, key=KEY)}
    assert all(await compute(engine, leases))
    assert_exact(await status_of(engine, "a"))


async def test_nothing_begins_anew_that_is_not_open(engine: Engine) -> None:
    """Unknown jobs, ended ones, and those that have the digest already stay as they are."""
    for name in ("succeeded", "failed", "cancelled", "there"):
        await engine.submit(one_shard(name))
    for lease in await engine.pull(ALPHA, 20):
        if lease.job.id == "succeeded":
            await compute(engine, [lease])
        else:
            await engine.fail(lease, PROBLEM)
    for _ in range(FAILURES_ALLOWED - 1):
        (lease,) = await engine.pull(ALPHA, 10)
        assert lease.job.id == "failed"
        await engine.fail(lease, PROBLEM)
    await engine.cancel("cancelled")
    for name in ("succeeded", "failed", "cancelled"):
        ended = await status_of(engine, name)
        assert ended.state == name
        assert await engine.restart(name, NEW, KEY) is False
        assert await status_of(engine, name) == ended
    assert await engine.restart("unknown", NEW, KEY) is False
    leases = await engine.pull(ALPHA, 100)
    assert await engine.restart("there", "bundle-a", KEY) is False
    assert await engine.renew(leases) == leases
    assert (await status_of(engine, "there")).job.key == make_job("there").key
    assert await engine.pull(NEWER, 100) == []
    assert (await engine.capacity()).backlog_rows == 10


async def test_two_restarts_at_once_are_one(engine: Engine) -> None:
    """Of two processes that see the same digest go, one begins the job anew."""
    await engine.submit(make_job("a"))
    await compute(engine, (await engine.pull(ALPHA, 20))[:1])
    done = await asyncio.gather(*[engine.restart("a", NEW, KEY) for _ in range(2)])
    assert sorted(done) == [False, True]
    assert len(await engine.pull(NEWER, 100)) == 4
    assert await engine.restart("a", NEW, KEY) is False
    assert (await engine.capacity()).backlog_rows == 40


async def test_a_digest_that_nobody_serves_may_come_later(engine: Engine) -> None:
    """The job waits in its new line like any other, and a worker that comes takes it."""
    await engine.submit(make_job("a"))
    assert await engine.restart("a", "bundle-of-tomorrow", KEY)
    assert (await engine.pull(ALPHA, 100), await engine.pull(NEWER, 100)) == ([], [])
    await finish_everything(engine, Worker("tomorrow", {"default": "bundle-of-tomorrow"}))
    assert_exact(await status_of(engine, "a"))


async def test_waiting_workers_are_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull that found nothing returns as soon as a job begins anew in its line."""
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    await engine.submit(one_shard("a"))
    pulling = asyncio.create_task(engine.pull(NEWER, 1))
    await asyncio.sleep(0.001)
    await engine.restart("a", NEW, KEY)
    assert [lease.job.bundle for lease in await pulling] == [NEW]


# What was drawn under the old digest


async def test_late_commits_count_nothing(engine: Engine) -> None:
    """Votes of the old key are refused before, beside and after those of the new one."""
    await engine.submit(make_job("a"))
    old = await engine.pull(ALPHA, 40)
    await engine.start(old)
    await engine.restart("a", NEW, KEY)
    assert await engine.commit(old[0], votes(old[0])) is False
    assert (await status_of(engine, "a")).state is State.QUEUED
    new = await engine.pull(NEWER, 100)
    assert [lease.shard for lease in new] == [lease.shard for lease in old]
    await engine.start(new)
    for stale, lease in zip(old, new, strict=True):
        assert await engine.commit(stale, votes(stale)) is False
        assert await engine.commit(lease, votes(lease)) is True
        assert await engine.commit(stale, votes(stale)) is False
    status = await status_of(engine, "a")
    assert_exact(status)
    assert status.estimation != true_votes(make_job("a"), Domain.ESTIMATION)
    assert (await engine.capacity()).backlog_rows == 0


async def test_old_leases_are_void(engine: Engine) -> None:
    """They are neither held nor renewed, and what is reported of them changes nothing."""
    await engine.submit(make_job("a"))
    old = await engine.pull(ALPHA, 40)
    await engine.restart("a", NEW, KEY)
    new = await engine.pull(NEWER, 20)
    assert (await engine.start(old), await engine.renew(old)) == ([], [])
    for _ in range(FAILURES_ALLOWED):
        for lease in old:
            await engine.fail(lease, PROBLEM)
    await engine.release(old)
    assert (await status_of(engine, "a")).state is State.QUEUED
    assert await engine.renew([*old, *new]) == new
    assert await engine.pull(ALPHA, 100) == []
    assert [lease.shard.index for lease in await engine.pull(NEWER, 100)] == [2, 3]


async def test_a_death_over_an_old_lease_does_not_count(harness: Harness) -> None:
    """A worker that died of the old shape makes no shard of the new one solitary."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    await engine.start(await engine.pull(ALPHA, 40))
    await engine.restart("a", NEW, KEY)
    await harness.wait(LEASE + 1)
    leases = await engine.pull(NEWER, 100)
    assert [lease.solitary for lease in leases] == [False] * 4
    await harness.wait(LEASE - 1)
    await engine.pull(BETA, 1)
    assert await engine.renew(leases) == leases


async def test_failures_under_the_old_digest_are_forgotten_and_deaths_are_not(
    harness: Harness,
) -> None:
    """Failures may be the shape's, and the new one has all its attempts; over whose rows a worker
    died stays alone."""
    engine = harness.engine
    await engine.submit(make_job("a", n0=0, n=20))
    await die(harness)
    for _ in range(FAILURES_ALLOWED - 1):
        (lease,) = await engine.pull(ALPHA, 1)
        assert lease.solitary
        await engine.fail(lease, PROBLEM)
    await engine.restart("a", NEW, KEY)
    for _ in range(FAILURES_ALLOWED - 1):
        (lease,) = await engine.pull(NEWER, 20)
        assert lease.solitary
        await engine.fail(lease, PROBLEM)
    await finish_everything(engine, NEWER)
    assert_exact(await status_of(engine, "a"))
    assert (await engine.queue()).dead_letters == 0


async def test_a_poison_job_ends_however_often_it_begins_anew(harness: Harness) -> None:
    """Deaths are counted across digests: a job that kills every worker does not live on by them."""
    engine, turns = harness.engine, [(ALPHA, "bundle-a"), (NEWER, NEW)]
    await engine.submit(one_shard("a"))
    for death in range(SOLITARY_DEATHS_ALLOWED + 1):
        worker, _ = turns[death % 2]
        _, bundle = turns[(death + 1) % 2]
        await engine.start(await engine.pull(worker, 1))
        await harness.wait(LEASE + 1)
        await engine.pull(Worker("birds", {"birds": "bundle-b"}), 1)  # Whoever pulls sweeps.
        assert await engine.restart("a", bundle, KEY) is (death < SOLITARY_DEATHS_ALLOWED)
    assert (await status_of(engine, "a")).state is State.FAILED


async def test_a_digest_may_come_back(engine: Engine) -> None:
    """Rows are a function of the key: under the first key again its late votes count, once."""
    job = make_job("a")
    await engine.submit(job)
    old = await engine.pull(ALPHA, 40)
    await engine.restart("a", NEW, KEY)
    between = await engine.pull(NEWER, 20)
    await engine.restart("a", job.bundle, job.key)
    new = await engine.pull(ALPHA, 40)
    assert len(new) == 4
    assert not any(await compute(engine, between))
    assert await compute(engine, [old[0], new[0], new[1], old[1]]) == [True, False, True, False]
    assert all(await compute(engine, new[2:]))
    assert_exact(await status_of(engine, "a"))


async def test_a_digest_that_comes_back_with_another_key_is_another(engine: Engine) -> None:
    """The key tells the rows: votes of the digest's first key are never counted for its second."""
    await engine.submit(make_job("a"))
    old = await engine.pull(ALPHA, 40)
    await engine.restart("a", NEW, KEY)
    await engine.restart("a", "bundle-a", bytes(32))
    new = await engine.pull(ALPHA, 40)
    assert {lease.job.key for lease in new} == {bytes(32)}
    assert not any(await compute(engine, old))
    assert all(await compute(engine, new))
    assert_exact(await status_of(engine, "a"))


# What stays right


async def test_rows_that_were_counted_wait_again(engine: Engine) -> None:
    """The books of everyone, of the owner and of the lanes are right before and after."""
    await engine.submit(make_job("slow", owner="ada"))
    await engine.submit(make_job("fast", owner="ada", mode=Mode.PREDICT))
    await engine.submit(make_job("other"))
    for _ in range(2):
        await compute(engine, await engine.pull(ALPHA, 20))
    done = {name: (await status_of(engine, name)).rows_done for name in ("slow", "fast", "other")}
    assert (done["fast"], done["slow"] + done["other"]) == (30, 10)
    assert await engine.restart("fast", NEW, KEY) is False
    assert await books(engine, "ada") == (70, 40 - done["slow"], 0, 70)
    await engine.restart("slow", NEW, KEY)
    left = 40 - done["other"]
    assert await books(engine, "ada") == (40 + left, 40, 0, 40 + left)
    await compute(engine, await engine.pull(NEWER, 20))
    assert await books(engine, "ada") == (20 + left, 20, 0, 20 + left)
    await engine.restart("slow", "bundle-a", KEY)
    assert await books(engine, "ada") == (40 + left, 40, 0, 40 + left)
    await engine.cancel("slow")
    assert await books(engine, "ada") == (left, 0, 0, left)


async def test_the_fast_lane_stays_the_fast_lane(engine: Engine) -> None:
    """A job keeps its lane, in the books and in the order of service."""
    await engine.submit(make_job("slow"))
    await engine.submit(make_job("fast", mode=Mode.PREDICT, owner="ada"))
    await compute(engine, await engine.pull(ALPHA, 10))
    for name in ("slow", "fast"):
        await engine.restart(name, NEW, KEY)
    assert await books(engine, "ada") == (70, 30, 30, 40)
    assert {lease.job.id for lease in await engine.pull(NEWER, 30)} == {"fast"}


async def test_no_bound_refuses_what_was_let_in(engine: Engine) -> None:
    """A job may begin anew though backlog and quota are full; new ones are refused all the more."""
    await engine.submit(make_job("a", owner="ada", n=OWNER_ROWS - 10))
    await compute(engine, await engine.pull(ALPHA, 50))
    await engine.submit(make_job("b", owner="ada"))
    await engine.submit(make_job("c", n=BACKLOG_ROWS - OWNER_ROWS))
    assert await engine.restart("a", NEW, KEY)
    assert await books(engine, "ada") == (BACKLOG_ROWS + 50, OWNER_ROWS + 40, 0, BACKLOG_ROWS + 50)
    with pytest.raises(QuotaExceeded):
        await engine.submit(one_shard("d", owner="ada"))
    with pytest.raises(Backlog):
        await engine.submit(one_shard("e"))
    for worker in (ALPHA, NEWER):
        await finish_everything(engine, worker)
    assert await books(engine, "ada") == (0, 0, 0, 0)


async def test_ages_are_since_the_job_was_accepted(harness: Harness) -> None:
    """Beginning anew makes no job younger, neither for operators nor for its retention."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job, idempotency_key="k")
    await harness.wait(RETENTION - 10)
    await engine.pull(NEWER, 0)
    await engine.restart("a", NEW, KEY)
    oldest = (await engine.queue()).lanes["lo"].oldest_seconds
    assert oldest == pytest.approx((RETENTION - 10) * harness.tick)
    assert len(await engine.pull(NEWER, 20)) == 2
    await harness.wait(11)
    assert await engine.status("a") is None
    assert await engine.pull(NEWER, 100) == []
    assert await books(engine, "ada") == (0, 0, 0, 0)
    assert not await harness.stores(job.pixels)
    assert not await harness.stores(KEY)


async def test_its_idempotency_key_finds_it(engine: Engine) -> None:
    """The caller's key is the job's as before, whatever digest the job has."""
    await engine.submit(make_job("a"), idempotency_key="k", fingerprint="f")
    await engine.restart("a", NEW, KEY)
    again = make_job("b", bundle=NEW)
    assert await engine.submit(again, idempotency_key="k", fingerprint="f") == "a"
    with pytest.raises(IdempotencyMismatch):
        await engine.submit(again, idempotency_key="k", fingerprint="g")
    assert await engine.forget("a")
    assert await engine.submit(again, idempotency_key="k", fingerprint="g") == "b"


async def test_forget_erases_both_keys(harness: Harness) -> None:
    """The old noise key goes at once, the new one and the image when the job is forgotten."""
    engine = harness.engine
    job = make_job("a")
    await engine.submit(job)
    old = await engine.pull(ALPHA, 20)
    await engine.restart("a", NEW, KEY)
    assert not await harness.stores(job.key)
    assert await harness.stores(KEY)
    leases = await engine.pull(NEWER, 20)
    assert await engine.forget("a")
    assert not await harness.stores(KEY)
    assert not await harness.stores(job.pixels)
    assert await engine.renew([*old, *leases]) == []


async def test_watchers_see_it_begin_anew(engine: Engine) -> None:
    """Whoever watches sees the rows go back to none, and the job through to its end."""
    await engine.submit(make_job("a"))
    seen: list[JobStatus] = []
    watching = asyncio.create_task(watched(engine, "a", seen))
    await soon(lambda: len(seen) == 1)
    await compute(engine, await engine.pull(ALPHA, 20))
    await soon(lambda: seen[-1].rows_done == 20)
    await engine.restart("a", NEW, KEY)
    await soon(lambda: seen[-1].rows_done == 0)
    assert (seen[-1].state, seen[-1].started, seen[-1].job.bundle) == (State.QUEUED, None, NEW)
    await finish_everything(engine, NEWER)
    async with asyncio.timeout(30):
        await watching
    assert_exact(seen[-1])


# What workers serve


async def test_every_digest_of_a_live_worker_is_known(harness: Harness) -> None:
    """Digests that few serve are known beside the one that most do, while any of them lives."""
    engine = harness.engine
    await engine.pull(BETA, 0)
    await engine.pull(Worker("birds", {"birds": "bundle-b"}), 0)
    capacity = await engine.capacity()
    assert capacity.digests == {"default": ("bundle-a", NEW), "birds": ("bundle-b",)}
    await harness.wait(40)
    await engine.pull(Worker("alpha", {"default": NEW}), 0)
    assert (await engine.capacity()).digests["default"] == (NEW, "bundle-a")
    await harness.wait(40)
    assert (await engine.capacity()).digests == {"default": (NEW,)}
