"""The engine's contract: one suite, run on every implementation.

An implementation joins with one line in HARNESSES. Times are in ticks, which a harness makes as
short as its engine can tell apart, or passes on a clock of its own.
"""

from __future__ import annotations

import asyncio

import pytest

from service.engine.protocol import (
    FAILURES_ALLOWED,
    ISOLATED_CRASHES_ALLOWED,
    Engine,
)
from service.jobs import State
from tests.support.engines import (
    ALPHA,
    BETA,
    LEASE,
    PROBLEM,
    SHARD_ROWS,
    Harness,
    assert_exact,
    compute,
    finish_everything,
    one_shard,
    status_of,
    votes,
)
from tests.support.fakes import make_job

# One job's way


async def test_votes_of_all_shards_add_up(engine: Engine) -> None:
    """A job goes from queued through running to succeeded, with exactly its rows' votes."""
    await engine.submit(make_job("a"))
    assert (await status_of(engine, "a")).state is State.QUEUED
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_running_job_shows_its_tally(engine: Engine) -> None:
    """While a job runs, its status holds the votes so far and the time it started."""
    await engine.submit(make_job("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    await compute(engine, [lease])
    status = await status_of(engine, "a")
    assert (status.state, status.rows_done, status.finished) == (State.RUNNING, 10, None)
    assert status.started is not None
    assert sum(status.selection) + sum(status.estimation) == 10


async def test_job_runs_once_a_shard_is_started(engine: Engine) -> None:
    """A prefetched shard leaves its job queued; a started one makes it running."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 1)
    assert (await status_of(engine, "a")).state is State.QUEUED
    await engine.start(leases)
    assert (await status_of(engine, "a")).state is State.RUNNING


async def test_pull_stops_at_the_rows_asked_for(engine: Engine) -> None:
    """A pull takes whole shards until the rows asked for are reached, and no more."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 15)
    assert [lease.shard.index for lease in leases] == [0, 1]


async def test_pull_of_nothing_is_nothing(engine: Engine) -> None:
    """A worker that only announces itself asks for no rows and gets none."""
    await engine.submit(make_job("a"))
    assert await engine.pull(BETA, 0) == []
    assert len(await engine.pull(ALPHA, 100)) == 4


async def test_pull_takes_from_many_jobs(engine: Engine) -> None:
    """One pull fills up with shards of several jobs of the task, oldest first."""
    for identity in "abc":
        await engine.submit(one_shard(identity))
    assert [lease.job.id for lease in await engine.pull(ALPHA, 100)] == ["a", "b", "c"]


async def test_leased_shards_are_not_pulled_again(engine: Engine) -> None:
    """While a lease lives nobody else gets its shard."""
    await engine.submit(make_job("a"))
    assert len(await engine.pull(ALPHA, 100)) == 4
    assert await engine.pull(BETA, 100) == []


async def test_waiting_pull_wakes_on_submit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that found nothing returns as soon as work comes."""
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    pulling = asyncio.create_task(engine.pull(ALPHA, 1))
    await asyncio.sleep(0.001)
    await engine.submit(one_shard("a"))
    assert [lease.job.id for lease in await pulling] == ["a"]


async def test_unknown_jobs_are_nothing(engine: Engine) -> None:
    """Asking after, watching, cancelling or forgetting an unknown job is no error."""
    assert await engine.status("x") is None
    assert [status async for status in engine.watch("x")] == []
    assert (await engine.cancel("x"), await engine.delete("x")) == (False, False)


@pytest.mark.parametrize("counts", [[10, 0], [10, 0, 0, 0], [11, -1, 0], [4, 4, 1], []], ids=str)
async def test_impossible_counts_are_refused(engine: Engine, counts: list[int]) -> None:
    """Counts of the wrong length, sign or sum raise, and the shard can still be counted."""
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    with pytest.raises(ValueError, match="count"):
        await engine.commit(lease, counts)
    await compute(engine, [lease])
    assert_exact(await status_of(engine, "a"))


# Leases and deliveries


async def test_expired_lease_is_pulled_again_and_counted_once(harness: Harness) -> None:
    """A shard whose worker vanished goes to another, and is in the votes once."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    lost = await engine.pull(ALPHA, 100)
    await harness.wait(LEASE + 1)
    again = await engine.pull(BETA, 100)
    assert [lease.shard for lease in again] == [lease.shard for lease in lost]
    assert {lease.token for lease in again}.isdisjoint(lease.token for lease in lost)
    assert all(await compute(engine, again))
    assert not any([await engine.commit(lease, votes(lease)) for lease in lost])
    assert_exact(await status_of(engine, "a"))


async def test_stale_owner_may_commit_first(harness: Harness) -> None:
    """The first commit of a shard is counted, and the second is refused."""
    engine = harness.engine
    await engine.submit(make_job("a"))
    (stale,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    (current,) = await engine.pull(BETA, 1)
    assert current.shard == stale.shard
    assert await engine.commit(stale, votes(stale)) is True
    assert await engine.renew([current]) == []
    assert await engine.commit(current, votes(current)) is False
    await finish_everything(engine)
    assert_exact(await status_of(engine, "a"))


async def test_late_commit_before_the_next_pull_counts(harness: Harness) -> None:
    """A commit after the lease ran out, but before anyone took the shard, is counted once."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    assert await engine.commit(lease, votes(lease)) is True
    assert await engine.pull(BETA, 1) == []
    assert_exact(await status_of(engine, "a"))


async def test_stale_commit_takes_a_waiting_shard_off_the_line(harness: Harness) -> None:
    """A shard that a stale owner commits while it waits again is not handed out any more."""
    engine = harness.engine
    await engine.submit(make_job("a", n0=0, n=2 * SHARD_ROWS))
    (stale,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    await status_of(engine, "a")
    assert await engine.commit(stale, votes(stale)) is True
    assert [lease.shard.index for lease in await engine.pull(BETA, 100)] == [1]


async def test_second_commit_of_a_shard_is_refused(engine: Engine) -> None:
    """Committing the same lease twice counts it once."""
    await engine.submit(make_job("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    assert await compute(engine, [lease]) == [True]
    assert await compute(engine, [lease]) == [False]
    assert (await status_of(engine, "a")).rows_done == 10


async def test_commit_after_the_end_is_refused(engine: Engine) -> None:
    """A job that has ended, or is gone, counts nothing more."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 100)
    await engine.cancel("a")
    assert await compute(engine, leases[:1]) == [False]
    await engine.delete("a")
    assert await compute(engine, leases[1:2]) == [False]


async def test_renewed_lease_outlives_its_first_term(harness: Harness) -> None:
    """A renewed lease is kept for a whole term from the renewal on."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    leases = await engine.pull(ALPHA, 1)
    for _ in range(3):
        await harness.wait(LEASE * 0.7)
        assert await engine.renew(leases) == leases
        assert await engine.pull(BETA, 1) == []


async def test_started_lease_begins_anew(harness: Harness) -> None:
    """Starting a shard renews its lease, and says which leases are lost, as renew does."""
    engine = harness.engine
    await engine.submit(make_job("a", n0=0, n=2 * SHARD_ROWS))
    (lost,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    held = await engine.pull(ALPHA, 100)
    for _ in range(3):
        await harness.wait(LEASE * 0.7)
        assert await engine.start([lost, *held]) == held
        assert await engine.pull(BETA, 100) == []
    assert await engine.start([]) == []


async def test_lost_lease_is_not_renewed(harness: Harness) -> None:
    """Once another holds the shard the first holder learns it from renew."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    lost = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    held = await engine.pull(BETA, 1)
    assert await engine.renew([*lost, *held]) == held


async def test_released_shards_are_pulled_again_unharmed(engine: Engine) -> None:
    """Handing a shard back any number of times, started or not, never counts against it."""
    await engine.submit(one_shard("a"))
    for _ in range(FAILURES_ALLOWED + ISOLATED_CRASHES_ALLOWED + 2):
        leases = await engine.pull(ALPHA, 1)
        await engine.start(leases)
        await engine.release(leases)
    (lease,) = await engine.pull(BETA, 1)
    assert not lease.isolated
    await compute(engine, [lease])
    assert_exact(await status_of(engine, "a"))


async def test_lost_leases_release_nothing(harness: Harness) -> None:
    """Releasing or failing a lost lease does not touch its new holder."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    (lost,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    held = await engine.pull(BETA, 1)
    await engine.release([lost])
    for _ in range(FAILURES_ALLOWED):
        await engine.fail(lost, PROBLEM)
    assert await engine.renew(held) == held
    assert await engine.pull(ALPHA, 1) == []
