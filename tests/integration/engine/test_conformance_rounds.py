"""The engine's contract: jobs that draw their estimation rows in rounds, with a look after each."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from service.engine.protocol import FAILURES_ALLOWED, Engine
from service.jobs import Domain, JobStatus, State
from tests.support.engines import (
    ALPHA,
    BETA,
    BOTH,
    LEASE,
    LOOKS,
    NEWER,
    PROBLEM,
    RETENTION,
    SHARD_ROWS,
    STARVATION,
    Harness,
    assert_exact,
    compute,
    due_jobs,
    finish_everything,
    job_in_rounds,
    one_shard,
    owned,
    soon,
    status_of,
    votes,
    votes_at,
    watched,
)
from tests.support.fakes import make_job, true_votes


async def reach(engine: Engine, job_id: str, look: int) -> None:
    """Compute and extend the job until this look is due."""
    for rows in LOOKS[: LOOKS.index(look) + 1]:
        assert rows == LOOKS[0] or await engine.extend(job_id, rows)
        await finish_everything(engine)


# Round after round


async def test_rounds_have_exactly_their_rows(engine: Engine) -> None:
    """Each round has the rows up to its look, counted once; the job ends when it is finished."""
    job = job_in_rounds("a")
    await engine.submit(job)
    for at, look in enumerate(LOOKS):
        assert at == 0 or await engine.extend("a", look)
        leases = await engine.pull(ALPHA, 100)
        assert sum(lease.shard.rows for lease in leases) == look - (0, *LOOKS)[at] + 10 * (at == 0)
        assert not (await status_of(engine, "a")).due
        assert all(await compute(engine, leases))
        assert await engine.pull(ALPHA, 100) == []
        status = await status_of(engine, "a")
        assert (status.state, status.due, status.rows_done) == (State.RUNNING, True, 10 + look)
        assert status.selection == true_votes(job, Domain.SELECTION)
        assert status.estimation == votes_at(job, look)
        assert status.looks == tuple(votes_at(job, earlier) for earlier in LOOKS[:at])
    assert await engine.finish("a", LOOKS[-1])
    status = await status_of(engine, "a")
    assert_exact(status)
    assert not status.due
    assert status.looks == tuple(votes_at(job, look) for look in LOOKS[:-1])


async def test_shards_of_a_round_are_those_of_the_whole_job(engine: Engine) -> None:
    """Whatever the rounds, a shard has the index and the rows that `Job.shards` gives it."""
    job = job_in_rounds("a")
    await engine.submit(job)
    shards = []
    for rows in (*LOOKS[1:], None):
        leases = await engine.pull(ALPHA, 100)
        shards += [lease.shard for lease in leases]
        await compute(engine, leases)
        assert rows is None or await engine.extend("a", rows)
    assert tuple(shards) == job.shards(SHARD_ROWS)


async def test_a_due_job_carries_no_pixels(engine: Engine) -> None:
    """What `due` returns is the job's status, question and all, without the image."""
    job = job_in_rounds("a")
    await engine.submit(job)
    await finish_everything(engine)
    (status,) = await engine.due()
    assert status.job == replace(job, pixels=b"")
    assert status.due
    assert status.estimation == votes_at(job, LOOKS[0])


async def test_jobs_are_due_until_somebody_decides(engine: Engine) -> None:
    """Every caller gets every due job, oldest first; an extended or finished one is due no more."""
    for identity in "abc":
        await engine.submit(job_in_rounds(identity))
    await engine.submit(one_shard("fixed"))
    assert await due_jobs(engine) == []
    await finish_everything(engine)
    assert [await due_jobs(engine) for _ in range(2)] == [["a", "b", "c"]] * 2
    await engine.extend("a", LOOKS[1])
    await engine.finish("b", LOOKS[0])
    assert await due_jobs(engine) == ["c"]
    await finish_everything(engine)
    assert sorted(await due_jobs(engine)) == ["a", "c"]


async def test_due_wakes_at_the_end_of_a_round(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for due jobs gets one as soon as the last shard of its round is counted."""
    await engine.submit(job_in_rounds("a"))
    *first, last = await engine.pull(ALPHA, 100)
    await compute(engine, first)
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    waiting = [asyncio.create_task(engine.due()) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(each.done() for each in waiting)
    await compute(engine, [last])
    async with asyncio.timeout(30):
        found = await asyncio.gather(*waiting)
    assert [[status.job.id for status in each] for each in found] == [["a"]] * 2


async def test_a_waiting_pull_wakes_at_the_next_round(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pull that found nothing returns as soon as a job is extended."""
    await engine.submit(job_in_rounds("a"))
    await finish_everything(engine)
    monkeypatch.setattr(engine, "_poll_seconds", 60.0)
    pulling = asyncio.create_task(engine.pull(ALPHA, 1))
    await asyncio.sleep(0.05)
    await engine.extend("a", LOOKS[1])
    async with asyncio.timeout(30):
        assert [lease.job.id for lease in await pulling] == ["a"]


async def test_watchers_see_looks_and_rounds(engine: Engine) -> None:
    """A watcher sees each look become due, each extension, and the end."""
    await engine.submit(job_in_rounds("a"))
    seen: list[JobStatus] = []
    watching = asyncio.create_task(watched(engine, "a", seen))
    await soon(lambda: len(seen) == 1)
    await compute(engine, await engine.pull(ALPHA, 100))
    await soon(lambda: seen[-1].due)
    await engine.extend("a", LOOKS[1])
    await soon(lambda: len(seen[-1].looks) == 1 and not seen[-1].due)
    await compute(engine, await engine.pull(ALPHA, 100))
    await soon(lambda: seen[-1].due)
    await engine.finish("a", LOOKS[1])
    async with asyncio.timeout(30):
        await watching
    assert seen[-1].state is State.SUCCEEDED


# Compare and set


async def test_a_round_begins_once(engine: Engine) -> None:
    """However many callers extend a job, one after another or at once, its rows are queued once."""
    job = job_in_rounds("a")
    await engine.submit(job)
    await finish_everything(engine)
    assert all(await asyncio.gather(*(engine.extend("a", LOOKS[1]) for _ in range(4))))
    leases = await engine.pull(ALPHA, 100)
    assert await engine.extend("a", LOOKS[1])
    assert sum(lease.shard.rows for lease in leases) == LOOKS[1] - LOOKS[0]
    assert await engine.pull(ALPHA, 100) == []
    await compute(engine, leases)
    assert await engine.extend("a", LOOKS[2])
    assert await engine.extend("a", LOOKS[1])
    await finish_everything(engine)
    status = await status_of(engine, "a")
    assert status.looks == (votes_at(job, LOOKS[0]), votes_at(job, LOOKS[1]))
    assert status.estimation == votes_at(job, LOOKS[2])


@pytest.mark.parametrize("stage", ["queued", "leased", "one shard left"])
async def test_a_look_that_is_not_due_is_refused(engine: Engine, stage: str) -> None:
    """Before its round is complete a job is neither extended nor finished, and goes on."""
    await engine.submit(job_in_rounds("a"))
    leases = [] if stage == "queued" else await engine.pull(ALPHA, 100)
    if stage == "one shard left":
        await compute(engine, leases[1:])
    assert not await engine.extend("a", LOOKS[1])
    assert not await engine.finish("a", LOOKS[0])
    assert await due_jobs(engine) == []
    await engine.release(leases)
    await finish_everything(engine)
    assert await due_jobs(engine) == ["a"]


async def test_only_the_next_look_of_the_schedule_is_taken(engine: Engine) -> None:
    """Other numbers of rows are refused: the first look, a later one, none of the schedule."""
    await engine.submit(job_in_rounds("a"))
    await finish_everything(engine)
    refused = (LOOKS[0], LOOKS[2], LOOKS[1] + 1, 0, LOOKS[2] + 1)
    assert [rows for rows in refused if await engine.extend("a", rows)] == []
    refused = (0, LOOKS[0] + 1, LOOKS[1], LOOKS[2])
    assert [look for look in refused if await engine.finish("a", look)] == []
    assert (await status_of(engine, "a")).due
    assert await engine.extend("a", LOOKS[1])


async def test_the_last_look_is_due_too(engine: Engine) -> None:
    """After all rows the job waits to be finished, and cannot be extended."""
    await engine.submit(job_in_rounds("a"))
    await reach(engine, "a", LOOKS[2])
    assert await due_jobs(engine) == ["a"]
    assert not (await status_of(engine, "a")).state.ended
    assert not await engine.extend("a", LOOKS[2] + 1)
    assert await engine.extend("a", LOOKS[2])  # As an earlier call did.
    assert await engine.finish("a", LOOKS[2])


async def test_a_job_is_finished_once(engine: Engine) -> None:
    """Of many calls every one learns that the job succeeded, and the end does not move."""
    await engine.submit(job_in_rounds("a"))
    await finish_everything(engine)
    assert all(await asyncio.gather(*(engine.finish("a", LOOKS[0]) for _ in range(4))))
    ended = await status_of(engine, "a")
    assert ended.state is State.SUCCEEDED
    assert await engine.finish("a", LOOKS[0])
    assert not await engine.extend("a", LOOKS[1])
    assert await status_of(engine, "a") == ended
    assert (await engine.capacity()).backlog_rows == 0


async def test_two_who_decide_differently_leave_one_decision(engine: Engine) -> None:
    """Where one extends and another finishes at the same moment, the job is one of both."""
    job = job_in_rounds("a")
    await engine.submit(job)
    await finish_everything(engine)
    _, finished = await asyncio.gather(engine.extend("a", LOOKS[1]), engine.finish("a", LOOKS[0]))
    assert finished  # At the look before, where the other was first.
    status = await status_of(engine, "a")
    assert (status.state, status.estimation) == (State.SUCCEEDED, votes_at(job, LOOKS[0]))
    assert await engine.pull(ALPHA, 100) == []
    assert status.rows_done == 10 + LOOKS[0]


async def test_jobs_without_looks_have_no_rounds(engine: Engine) -> None:
    """A job of a fixed number of rows is never due, and ends by itself."""
    await engine.submit(make_job("a"))
    leases = await engine.pull(ALPHA, 100)
    await compute(engine, leases[1:])
    assert not await engine.extend("a", 30)
    assert not await engine.finish("a", 30)
    await compute(engine, leases[:1])
    assert_exact(await status_of(engine, "a"))
    assert await due_jobs(engine) == []
    assert await engine.finish("a", 30)  # It has succeeded.


async def test_unknown_jobs_are_not_decided(engine: Engine) -> None:
    """An unknown job is neither extended nor finished."""
    assert not await engine.extend("x", LOOKS[1])
    assert not await engine.finish("x", LOOKS[0])


# The end at an earlier look


@pytest.mark.parametrize("stage", ["queued", "leased", "one shard left", "due"])
async def test_a_job_ends_at_its_last_whole_look(engine: Engine, stage: str) -> None:
    """A job whose later round is under way ends with the votes of the look before."""
    job = job_in_rounds("a", owner="ada")
    await engine.submit(job)
    await reach(engine, "a", LOOKS[1])
    await engine.extend("a", LOOKS[2])
    leases = [] if stage == "queued" else await engine.pull(ALPHA, 100)
    done = {"queued": 0, "leased": 0, "one shard left": 1, "due": 2}[stage]
    await compute(engine, leases[:done])
    assert not await engine.finish("a", LOOKS[0])
    assert await engine.finish("a", LOOKS[1])
    status = await status_of(engine, "a")
    assert status.state is State.SUCCEEDED
    assert status.selection == true_votes(job, Domain.SELECTION)
    assert status.estimation == votes_at(job, LOOKS[1])
    assert status.looks == (votes_at(job, LOOKS[0]),)
    assert status.rows_done == 10 + LOOKS[1] + SHARD_ROWS * done
    assert not status.due
    assert not any(await compute(engine, leases[done:]))
    assert await engine.renew(leases) == []
    assert await engine.pull(BETA, 100) == []
    assert await status_of(engine, "a") == status
    assert ((await engine.capacity()).backlog_rows, await owned(engine, "ada")) == (0, 0)


# Ends of other kinds


@pytest.mark.parametrize("stage", ["due", "extended"])
@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_dropped_jobs_are_not_decided(engine: Engine, end: str, stage: str) -> None:
    """A cancelled or deleted job is not due, and neither extended nor finished."""
    await engine.submit(job_in_rounds("a", owner="ada"))
    await finish_everything(engine)
    if stage == "extended":
        await engine.extend("a", LOOKS[1])
    leases = await engine.pull(ALPHA, 100)
    assert await (engine.cancel("a") if end == "cancel" else engine.delete("a"))
    assert await due_jobs(engine) == []
    assert not await engine.extend("a", LOOKS[1])
    assert not await engine.finish("a", LOOKS[0])
    assert not any(await compute(engine, leases))
    assert await engine.pull(ALPHA, 100) == []
    assert ((await engine.capacity()).backlog_rows, await owned(engine, "ada")) == (0, 0)


async def test_a_dead_shard_ends_a_later_round(engine: Engine) -> None:
    """A shard that fails for the third time fails its job in any round, votes and all kept."""
    job = job_in_rounds("a")
    await engine.submit(job)
    await finish_everything(engine)
    await engine.extend("a", LOOKS[1])
    for _ in range(FAILURES_ALLOWED):
        (lease,) = await engine.pull(ALPHA, 1)
        await engine.fail(lease, PROBLEM)
    status = await status_of(engine, "a")
    assert (status.state, status.problem) == (State.FAILED, PROBLEM)
    assert status.looks == (votes_at(job, LOOKS[0]),)
    assert not await engine.finish("a", LOOKS[0])
    assert not await engine.extend("a", LOOKS[2])
    assert await due_jobs(engine) == []


async def test_a_lost_lease_is_counted_once_in_any_round(harness: Harness) -> None:
    """A later round's shard whose worker vanished counts once, whichever worker commits first."""
    engine, job = harness.engine, job_in_rounds("a")
    await engine.submit(job)
    stale = []
    for at, look in enumerate(LOOKS):
        assert at == 0 or await engine.extend("a", look)
        stale += await engine.pull(ALPHA, 100)
        await harness.wait(LEASE + 1)
        await finish_everything(engine, BETA)
        assert not any([await engine.commit(lease, votes(lease)) for lease in stale])
        assert await engine.renew(stale) == []
        assert (await status_of(engine, "a")).estimation == votes_at(job, look)
    assert await engine.finish("a", LOOKS[-1])
    assert_exact(await status_of(engine, "a"))


@pytest.mark.parametrize("seed", range(3))
async def test_rounds_stay_exact_under_faults(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Leases are lost, shards handed back and committed twice, looks decided twice: exact votes."""
    engine, chance = harness.engine, random.Random(seed)
    monkeypatch.setattr(engine, "_poll_seconds", 0.001)
    ends = {f"job-{number}": chance.choice(LOOKS) for number in range(6)}
    for identity in ends:
        await engine.submit(job_in_rounds(identity))
    while (await engine.capacity()).backlog_rows:
        leases = await engine.pull(chance.choice([ALPHA, BETA]), chance.randrange(10, 40))
        for lease in leases:
            match chance.choice(["lost", "back", "once", "once", "twice"]):
                case "back":
                    await engine.release([lease])
                case "once":
                    await engine.commit(lease, votes(lease))
                case "twice":
                    both = [engine.commit(lease, votes(lease)) for _ in range(2)]
                    assert (await asyncio.gather(*both)).count(True) <= 1
        due = await engine.due()
        for status in due:
            job_id, look = status.job.id, sum(status.estimation)
            if look == ends[job_id]:
                assert all([await engine.finish(job_id, look) for _ in range(2)])
            else:
                rows = LOOKS[LOOKS.index(look) + 1]
                both = [engine.extend(job_id, rows) for _ in range(2)]
                assert all(await asyncio.gather(*both))
        if not (leases or due):
            await harness.wait(LEASE + 1)
    for job_id, look in ends.items():
        status = await status_of(engine, job_id)
        assert status.state is State.SUCCEEDED
        assert status.rows_done == 10 + look
        assert status.selection == true_votes(status.job, Domain.SELECTION)
        taken = LOOKS[: LOOKS.index(look) + 1]
        assert (*status.looks, status.estimation) == tuple(votes_at(status.job, m) for m in taken)


async def test_an_undecided_job_vanishes_after_the_retention(harness: Harness) -> None:
    """A job that nobody extends or finishes is erased like any unfinished one."""
    engine, job = harness.engine, job_in_rounds("a")
    await engine.submit(job)
    await finish_everything(engine)
    await harness.wait(RETENTION + 1)
    assert await due_jobs(engine) == []
    assert await engine.status("a") is None
    assert not await harness.stores(job.pixels)
    assert not await harness.stores(job.key)
    assert (await engine.capacity()).backlog_rows == 0


async def test_a_round_that_nobody_serves_fails(harness: Harness) -> None:
    """A job whose digest is gone by its second round fails after the time of any other job."""
    engine = harness.engine
    await engine.submit(job_in_rounds("a"))
    await finish_everything(engine)
    await engine.extend("a", LOOKS[1])
    await harness.look(NEWER, ticks=400)
    assert (await status_of(engine, "a")).state is State.FAILED


# Backlog and place


async def test_all_rows_are_reserved_until_the_end(engine: Engine) -> None:
    """The backlog and the owner's part have n0 + n less the rows done; the end returns the rest."""
    await engine.submit(job_in_rounds("a", owner="ada"))

    async def reserved() -> tuple[int, int, int]:
        lo = (await engine.stats()).priorities["lo"].rows
        return lo, (await engine.capacity()).backlog_rows, await owned(engine, "ada")

    assert await reserved() == (50,) * 3
    await finish_everything(engine)
    assert await reserved() == (25,) * 3
    await engine.extend("a", LOOKS[1])
    assert await reserved() == (25,) * 3
    await finish_everything(engine)
    assert await reserved() == (20,) * 3
    await engine.finish("a", LOOKS[1])
    assert await reserved() == (0,) * 3


async def test_later_rounds_keep_the_jobs_place(engine: Engine) -> None:
    """A later round goes before younger jobs, however many wait; PREDICT still goes first."""
    await engine.submit(job_in_rounds("old"))
    for identity in "abc":
        await engine.submit(make_job(identity))
    await compute(engine, await engine.pull(ALPHA, 25))
    await engine.extend("old", LOOKS[1])
    await engine.submit(one_shard("fast"))
    leases = await engine.pull(ALPHA, 40)
    assert [lease.job.id for lease in leases] == ["fast", "old", "a", "a", "a"]
    await compute(engine, leases)
    await engine.extend("old", LOOKS[2])
    leases = await engine.pull(ALPHA, 30)
    assert [lease.job.id for lease in leases] == ["old", "old", "a"]


async def test_later_rounds_have_their_turn_beside_fast_jobs(engine: Engine) -> None:
    """However much PREDICT comes, every fourth pull takes a waiting later round."""
    await engine.submit(job_in_rounds("slow"))
    await reach(engine, "slow", LOOKS[1])
    await engine.extend("slow", LOOKS[2])
    served = []
    for at in range(8):
        await engine.submit(one_shard(f"fast-{at}"))
        (lease,) = await engine.pull(ALPHA, 1)
        served.append(lease.job.id[:4])
    assert served == 2 * ["fast", "fast", "fast", "slow"]


async def test_age_of_a_later_round_is_that_of_its_job(harness: Harness) -> None:
    """The operator sees how long ago the job of the oldest waiting shard was accepted."""
    engine = harness.engine
    await engine.submit(job_in_rounds("a"))
    await finish_everything(engine)
    await harness.wait(3)
    assert (await engine.stats()).priorities["lo"].oldest_seconds == 0.0
    await engine.extend("a", LOOKS[1])
    oldest = (await engine.stats()).priorities["lo"].oldest_seconds
    assert oldest == pytest.approx(3 * harness.tick)


async def test_a_later_round_has_not_starved(harness: Harness) -> None:
    """A task whose job was just served does not take the worker from its preferred task."""
    engine = harness.engine
    await engine.submit(job_in_rounds("birds", task="birds", bundle="bundle-b"))
    await harness.wait(STARVATION + 1)
    await finish_everything(engine, BOTH)
    await engine.submit(one_shard("a"))
    await engine.extend("birds", LOOKS[1])
    (lease,) = await engine.pull(BOTH, 1, prefer_task="default")
    assert lease.job.id == "a"
