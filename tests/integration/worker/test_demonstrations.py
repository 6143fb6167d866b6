"""Demonstrations in the worker's loop: computed alone, with a result, at no cost to other jobs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from models.demonstrations.limits import Demonstration
from models.kinds import NoGradients
from models.rows import Rows
from service.engine.memory import MemoryEngine
from service.engine.protocol import Engine, Lease
from service.jobs import Domain, Job, Mode, Shard, State
from service.worker.batching import Packer
from tests.support.fakes import FakeModel, make_job, true_votes
from tests.support.shelf import ROWS, Shelf, bundles
from tests.support.working import assert_exact, final, served, submit, working


def demonstration(identity: str, n: int = 6, epsilon: float | None = None) -> Job:
    kind = Demonstration.ROWS if epsilon is None else Demonstration.ATTACK
    return replace(make_job(identity, n0=0, n=n), mode=kind, epsilon=epsilon, method="")


@pytest.mark.parametrize(
    ("epsilon", "result"), [(None, b"pictures within None"), (0.5, b"pictures within 0.5")]
)
async def test_result_arrives_with_the_votes(
    either: Engine, epsilon: float | None, result: bytes
) -> None:
    """Jobs beside it get exactly their own rows' votes, and no result."""
    job, beside = demonstration("shown", epsilon=epsilon), make_job("beside")
    await submit(either, beside, job)
    async with working(either, {"default": FakeModel()}):
        status = await final(either, "shown")
        await assert_exact(either, beside)
    assert (status.state, status.result) == (State.SUCCEEDED, result)
    assert status.estimation == true_votes(job, Domain.ESTIMATION)
    assert (await final(either, "beside")).result == b""


def test_a_demonstration_is_a_batch() -> None:
    """Whatever its rows, and whatever waits beside it."""
    jobs = [make_job("a", n0=0, n=3), demonstration("b", n=6), make_job("c", n0=0, n=3)]
    packer, batches = Packer(batch_rows=4), []
    for job in jobs:
        packer.add(Lease(job, Shard(0, Domain.ESTIMATION, 0, job.n), job.id))
    while batch := packer.next_batch():
        batches.append([(part.lease.token, part.rows) for part in batch])
        packer.absorb(batch, np.array([[part.rows, 0, 0] for part in batch]))
    assert batches == [[("a", 3), ("c", 1)], [("b", 6)], [("c", 2)]]


async def test_failing_one_ends_alone(engine: MemoryEngine) -> None:
    """Its third failure ends it with a problem; the jobs beside it are exact."""
    bad, beside = demonstration("bad"), [make_job(f"job-{at}", mode=Mode.PREDICT) for at in "ab"]
    await submit(engine, bad, *beside)
    model = FakeModel(poison={bad.domain_key(Domain.ESTIMATION)})
    async with working(engine, {"default": model}):
        status = await final(engine, "bad")
        for job in beside:
            await assert_exact(engine, job)
    assert (status.state, status.result) == (State.FAILED, b"")
    assert status.problem is not None
    assert status.problem["detail"] == "The same rows failed 3 times: RuntimeError."


async def test_networks_without_gradients_are_named(engine: MemoryEngine) -> None:
    """A package's kind shows only in the attack that it gives none; the problem names the task."""

    class Opaque(FakeModel):
        def demonstrate(
            self, rows: Rows, epsilon: float | None, digest: str
        ) -> tuple[NDArray[np.int64], bytes]:
            raise NoGradients("the networks give no gradients")

    await submit(engine, demonstration("a", epsilon=0.5), beside := make_job("beside"))
    async with working(engine, {"default": Opaque()}):
        status = await final(engine, "a")
        await assert_exact(engine, beside)
    assert status.problem is not None
    wanted = 'Task "default" cannot be attacked: its networks have no gradients'
    assert status.problem["detail"] == wanted


async def test_changed_digest_computes_nothing(engine: MemoryEngine) -> None:
    """The job waits for a worker of its own digest."""

    class Changed(FakeModel):
        def votes(self, parts: Iterable[Rows], digest: str) -> NDArray[np.int64]:
            self.digest = "bundle-b"
            return super().votes(parts, digest)

    await submit(engine, demonstration("a"))
    async with working(engine, {"default": (model := Changed())}):
        await served(engine, "bundle-b")
    assert model.batches == []
    status = await engine.status("a")
    assert status is not None
    assert (status.state.ended, status.result) == (False, b"")


def test_networks_are_loaded_at_the_first_demonstration() -> None:
    """As for votes."""
    shelf = Shelf(bundles("a"))
    model = shelf.cache["a"]
    votes, result = model.demonstrate(ROWS, 0.5, model.digest)
    assert shelf.loads == ["a"]
    assert (votes.sum(), result) == (3, b"pictures within 0.5")
