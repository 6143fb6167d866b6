"""The engine's contract: aliases of jobs, run on every implementation."""

from __future__ import annotations

import pytest

from service.engine.protocol import Engine
from tests.support.engines import RETENTION, Harness, finish_everything, one_shard


async def test_an_alias_finds_its_job(engine: Engine) -> None:
    """A job is found by each of its aliases, and by no other name."""
    await engine.submit(one_shard("a"))
    await engine.name("a", "first")
    await finish_everything(engine)
    await engine.name("a", "second")
    assert [await engine.named(name) for name in ("first", "second")] == ["a", "a"]
    assert await engine.named("third") is None
    assert await engine.named("a") is None


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
async def test_an_alias_outlives_each_of_its_jobs(engine: Engine, first: str, second: str) -> None:
    """While one of the jobs that have it is there, the alias leads to a job that is."""
    for job in ("a", "b"):
        await engine.submit(one_shard(job))
        await engine.name(job, "same")
    assert await engine.named("same") in ("a", "b")
    await engine.delete(first)
    assert await engine.named("same") == second


async def test_an_alias_goes_with_its_job(engine: Engine) -> None:
    """A deleted job has no alias, and an alias of it can be given to another job."""
    for job in ("a", "b"):
        await engine.submit(one_shard(job))
    await engine.name("a", "same")
    await engine.name("b", "same")
    await engine.delete("b")
    await engine.delete("a")
    assert await engine.named("same") is None
    await engine.submit(one_shard("c"))
    await engine.name("c", "same")
    assert await engine.named("same") == "c"


async def test_an_unknown_job_gets_no_alias(engine: Engine) -> None:
    """Naming a job that the engine does not have changes nothing."""
    await engine.name("nobody", "same")
    assert await engine.named("same") is None


async def test_an_alias_lives_as_long_as_its_job(harness: Harness) -> None:
    """It is found to the end of the job's retention, and gone with it."""
    engine = harness.engine
    await engine.submit(one_shard("a"))
    await finish_everything(engine)
    await harness.wait(RETENTION / 2)
    await engine.name("a", "late")
    await harness.wait(RETENTION / 2 - 5)
    assert await engine.named("late") == "a"
    await harness.wait(10)
    assert await engine.named("late") is None
    assert not await harness.stores(b"late")
