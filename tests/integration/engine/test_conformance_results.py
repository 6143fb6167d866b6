"""The engine's contract: demonstrations, whose one shard has a result beside its votes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.demonstrations.limits import Demonstration
from service.engine.protocol import MOST_RESULT_BYTES, Engine
from service.jobs import Domain, Job, State
from tests.support.engines import (
    ALPHA,
    BETA,
    LEASE,
    OPTIONS,
    RETENTION,
    SHARD_ROWS,
    Harness,
    compute,
    die,
    finish_everything,
    one_shard,
    status_of,
    votes,
)
from tests.support.fakes import make_job, true_votes

RESULT = b'{"seen": "\x00\xff"}'


def demonstration(identity: str, **fields: Any) -> Job:
    """A demonstration of more rows than other shards have."""
    job = make_job(identity, n0=0, n=SHARD_ROWS + 2, **fields)
    return replace(job, mode=Demonstration.ATTACK, epsilon=0.5, setup_rows=20, method="")


async def test_result_lies_beside_the_votes(engine: Engine) -> None:
    """One shard has all rows; its job ends with the votes and the very bytes of the result."""
    await engine.submit(job := demonstration("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    assert lease.job == job
    assert (lease.shard.domain, lease.shard.rows) == (Domain.ESTIMATION, job.n)
    assert (await status_of(engine, "a")).result == b""
    await engine.start([lease])
    assert await engine.commit(lease, votes(lease), RESULT) is True
    status = await status_of(engine, "a")
    assert (status.state, status.result) == (State.SUCCEEDED, RESULT)
    assert status.estimation == true_votes(job, Domain.ESTIMATION)
    assert (status.job.mode, status.job.epsilon) == (Demonstration.ATTACK, 0.5)


async def test_charge_is_returned_at_the_end(engine: Engine) -> None:
    """The steps of an attack count in the backlog, as do its rows, until the job ends."""
    await engine.submit(job := demonstration("a", owner="ada"))
    assert (await engine.capacity("ada")).owner_rows == job.charge == job.rows + 20
    assert (await engine.stats()).priorities["lo"].rows == job.charge
    (lease,) = await engine.pull(ALPHA, 1)
    await engine.commit(lease, votes(lease), RESULT)
    assert (await engine.capacity("ada")).owner_rows == 0


async def test_first_result_stays(harness: Harness) -> None:
    """A shard that was computed twice keeps the result that was committed first."""
    engine = harness.engine
    await engine.submit(demonstration("a"))
    (stale,) = await engine.pull(ALPHA, 1)
    await harness.wait(LEASE + 1)
    (current,) = await engine.pull(BETA, 1)
    assert await engine.commit(current, votes(current), RESULT) is True
    assert await engine.commit(stale, votes(stale), b"another") is False
    assert (await status_of(engine, "a")).result == RESULT


async def test_a_worker_that_dies_in_one_loses_nothing(harness: Harness) -> None:
    """The demonstration is computed alone by another worker, and the jobs beside it end."""
    engine = harness.engine
    await engine.submit(demonstration("a"))
    await engine.submit(make_job("beside"))
    await die(harness)
    (isolated,) = [each for each in await engine.pull(BETA, 1) if each.isolated]
    assert isolated.job.id == "a"
    await engine.start([isolated])
    assert await engine.commit(isolated, votes(isolated), RESULT) is True
    await finish_everything(engine)
    assert (await status_of(engine, "beside")).state is State.SUCCEEDED


async def test_large_result_is_refused(engine: Engine) -> None:
    """It raises with its size and the limit, and the shard can still be committed."""
    await engine.submit(demonstration("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    with pytest.raises(ValueError, match=f"{MOST_RESULT_BYTES + 1} bytes; at most"):
        await engine.commit(lease, votes(lease), bytes(MOST_RESULT_BYTES + 1))
    assert await engine.commit(lease, votes(lease), RESULT) is True


async def test_results_are_bounded(harness: Harness) -> None:
    """The oldest job with a result goes for a new one; those without results stay."""
    engine = harness.engine
    await engine.submit(make_job("plain"))
    await finish_everything(engine)
    names = [f"job-{number}" for number in range(OPTIONS.max_results + 2)]
    for name in names:
        await harness.wait(0.01)
        await engine.submit(demonstration(name))
        (lease,) = await engine.pull(ALPHA, 1)
        await engine.commit(lease, votes(lease), f"<{name}>".encode())
        if name == names[1]:
            await engine.delete(name)
    kept = [name for name in names if await engine.status(name) is not None]
    assert kept == names[2:]
    assert await engine.status("plain") is not None
    await engine.submit(demonstration("last"))
    (lease,) = await engine.pull(ALPHA, 1)
    await engine.commit(lease, votes(lease), b"last")
    assert await engine.status(names[2]) is None
    assert not await harness.stores(f"<{names[2]}>".encode())
    assert await harness.stores(f"<{names[3]}>".encode())


@pytest.mark.parametrize("by", ["delete", "time"])
async def test_result_goes_with_its_job(harness: Harness, by: str) -> None:
    """Deleting the job, or its retention, leaves no byte of the result."""
    engine = harness.engine
    await engine.submit(demonstration("a"))
    (lease,) = await engine.pull(ALPHA, 1)
    await engine.commit(lease, votes(lease), b"<pictures>")
    assert await harness.stores(b"<pictures>")
    if by == "delete":
        assert await engine.delete("a") is True
    else:
        await harness.wait(RETENTION + 1)
    assert await engine.status("a") is None
    assert not await harness.stores(b"<pictures>")


async def test_demonstrations_have_the_priority_of_certifications(engine: Engine) -> None:
    """They wait in the same order, and behind every prediction."""
    await engine.submit(make_job("certify"))
    await engine.submit(demonstration("a"))
    await engine.submit(one_shard("predict"))
    leases = await engine.pull(ALPHA, 100)
    assert [lease.job.id for lease in leases] == ["predict", *["certify"] * 4, "a"]
    assert all(await compute(engine, leases))
