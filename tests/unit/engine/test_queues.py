"""service/engine/queues.py: whose shards of the in-process engine are next."""

from __future__ import annotations

from random import Random

import pytest

from service.engine.memory_state import Record
from service.engine.protocol import Worker
from service.engine.queues import Lines
from service.jobs import Domain
from tests.support.fakes import make_job

NEWER = Worker("newer", {"default": "bundle-n"})


def record(identity: str, submitted: float, bundle: str) -> Record:
    job = make_job(identity, bundle=bundle, n0=0, n=20)
    shards = job.shards(10)
    votes = {domain: [0] * job.classes for domain in Domain}
    return Record(job, shards, submitted, None, "", list(range(len(shards))), votes)


@pytest.mark.parametrize("seed", range(5))
def test_jobs_of_another_line_come_at_their_place(seed: int) -> None:
    """Whichever jobs begin anew, and in whatever order, the line is served by submission."""
    lines, bundles = Lines(), ["bundle-a", "bundle-n"] * 5
    Random(seed).shuffle(bundles)
    records = [record(f"job-{at}", at // 2, bundle) for at, bundle in enumerate(bundles)]
    for one in records:
        lines.add(one)
    moving = [one for one in records if one.job.bundle == "bundle-a"]
    Random(seed).shuffle(moving)
    for one in moving:
        lines.remove(one)
        one.restart("bundle-n", bytes(32))
        lines.add(one)
    assert lines.next_for(Worker("alpha", {"default": "bundle-a"}), None, 1.0, 10.0) is None
    line = lines.next_for(NEWER, None, 1.0, 10.0)
    assert line is not None
    taken = line.take(1_000)
    assert len(taken) == 20
    submitted = [taken_from.submitted for taken_from, _ in taken]
    assert submitted == sorted(submitted)
