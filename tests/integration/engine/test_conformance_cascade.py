"""The engine's contract: jobs that have a round for each of several noise levels."""

from __future__ import annotations

from dataclasses import replace

from service.engine.protocol import Engine
from service.jobs import Domain, Job, State
from tests.support.engines import (
    ALPHA,
    BETA,
    LEASE,
    Harness,
    compute,
    due_jobs,
    finish_everything,
    open_rows,
    status_of,
    votes,
)
from tests.support.fakes import fake_votes, make_job

SIGMAS = (0.5, 0.25)


def cascade(identity: str) -> Job:
    """Two stages of 10 selection rows and 30 estimation rows."""
    return replace(make_job(identity), method="cascade", stages=SIGMAS, looks=(30, 60))


def true_stage(job: Job, domain: Domain, stage: int) -> tuple[int, ...]:
    """The exact votes of one domain of rows of a stage."""
    rows = job.n0 if domain is Domain.SELECTION else job.n
    key = job.domain_key(domain, stage)
    return tuple(fake_votes(key, range(stage * rows, (stage + 1) * rows), job.classes))


async def test_each_stage_has_its_own_rows_and_votes(engine: Engine) -> None:
    """Selection votes begin from zero, estimation votes of a stage can be told from the others'."""
    job = cascade("a")
    await engine.submit(job)
    assert await open_rows(engine, [job]) == 80
    for stage, look in enumerate(job.looks):
        assert stage == 0 or await engine.extend("a", look)
        leases = await engine.pull(ALPHA, 100)
        assert {lease.job.stage_of(lease.shard) for lease in leases} == {stage}
        assert sum(lease.shard.rows for lease in leases) == 40
        assert all(await compute(engine, leases))
        status = await status_of(engine, "a")
        assert (status.due, status.rows_done) == (True, 40 * (stage + 1))
        assert status.selection == true_stage(job, Domain.SELECTION, stage)
        assert status.votes_by_stage == tuple(
            true_stage(job, Domain.ESTIMATION, each) for each in range(stage + 1)
        )
    assert await engine.finish("a", 60)
    assert (await status_of(engine, "a")).state is State.SUCCEEDED
    assert (await engine.capacity()).backlog_rows == 0


async def test_a_cascade_may_end_at_any_stage(engine: Engine) -> None:
    """The rows of the stages that were not read are given back."""
    await engine.submit(cascade("a"))
    assert (await engine.capacity()).backlog_rows == 80
    await finish_everything(engine)
    assert await due_jobs(engine) == ["a"]
    assert await engine.finish("a", 30)
    status = await status_of(engine, "a")
    assert (status.state, status.rows_done) == (State.SUCCEEDED, 40)
    assert len(status.votes_by_stage) == 1
    assert (await engine.capacity()).backlog_rows == 0


async def test_a_late_vote_of_an_earlier_stage_is_not_counted(harness: Harness) -> None:
    """A worker that lost its lease cannot vote in the stage after it, not even by selection."""
    engine, job = harness.engine, cascade("a")
    await engine.submit(job)
    (late, *_) = await engine.pull(ALPHA, 10)
    assert late.shard.domain is Domain.SELECTION
    await engine.start([late])
    await harness.wait(LEASE + 1)
    await finish_everything(engine, BETA)
    assert await engine.extend("a", 60)
    assert await engine.extend("a", 60)
    assert not await engine.commit(late, votes(late))
    assert sum((await status_of(engine, "a")).selection) == 0
    await finish_everything(engine, BETA)
    status = await status_of(engine, "a")
    assert status.selection == true_stage(job, Domain.SELECTION, 1)
    assert await engine.extend("a", 60)
    assert (await status_of(engine, "a")).selection == status.selection
