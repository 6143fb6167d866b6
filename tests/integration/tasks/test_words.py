"""Answers are in the words of the very bundle that was asked, or there are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from service.config import Settings
from service.engine.protocol import Engine, Worker
from service.errors import Backlog, NotFound
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from service.tasks.catalog import Catalog
from tests.support.engines import HARNESSES
from tests.support.serving import KEYS, NUMERICS, SECRET, TASKS, Service, png, problem, serving

BIRDS, DOGS = ("bird", "plane", "ship"), ("dog", "cat", "frog")


def publish(tasks: Path, labels: Sequence[str], name: str = "pets") -> Bundle:
    """A bundle of these labels under this name."""
    folder = tasks / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DEFAULT_TASK, folder)
    made = replace(read_bundle(DEFAULT_TASK), id=name, labels=tuple(labels))
    (folder / "manifest.json").write_text(json.dumps(made.manifest))
    return read_bundle(folder)


@pytest.fixture(params=HARNESSES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    harness = HARNESSES[request.param](request)
    yield harness.engine
    await harness.close()


async def works(engine: Engine, bundle: Bundle, name: str = "pets") -> int:
    """A worker with this bundle takes what it may, votes for the first label, and says how much."""
    worker = Worker(f"with {bundle.labels}", {name: bundle.served_digest(NUMERICS)}, [NUMERICS])
    leases = await engine.pull(worker, 10_000)
    for lease in leases:
        votes = [lease.shard.rows, *[0] * (lease.job.classes - 1)]
        assert await engine.commit(lease, votes)
    return len(leases)


@pytest.mark.parametrize("others", [BIRDS, (*BIRDS, "car")], ids=["other words", "more words"])
async def test_a_fleet_of_unequal_copies_never_answers_in_the_wrong_words(
    engine: Engine, tmp_path: Path, others: tuple[str, ...]
) -> None:
    """Where workers have another bundle under a task's name than the API, it takes no question;
    with workers of both, each question is computed by those of its own bundle."""
    ours = publish(tmp_path / "ours", DOGS)
    theirs = publish(tmp_path / "theirs", others)
    asked = PredictRequest.model_validate({"image": png(), "task": "pets", "n": 30, "n0": 10})
    desks = []
    for folder in ("ours", "theirs"):
        catalog = Catalog(TASKS, tmp_path / folder)
        await catalog.refresh()
        settings = Settings(data_dir=tmp_path / folder)
        desks.append(Predictions(settings, engine, catalog, SECRET, KEYS))
    for desk in desks:
        desk._admission._first_requests["pets"] = float("-inf")  # It was waited for already.
    await works(engine, theirs)
    with pytest.raises(Backlog, match='Live workers have another bundle of task "pets"'):
        await desks[0].submit(asked, None, None)
    await works(engine, ours)
    jobs = [await desk.submit(asked, None, None) for desk in desks]
    for bundle in (ours, theirs, ours, theirs):
        await works(engine, bundle)
    for desk, job_id, word in zip(desks, jobs, ("dog", "bird"), strict=True):
        status = await desk.ended(job_id, 30)
        assert status is not None
        assert (await desk.to_response(status)).label == word
    status = await desks[0].status(jobs[1], None)
    for told in (desks[0].to_response, desks[0].to_job_response):
        with pytest.raises(NotFound, match="is gone or was replaced"):
            await told(status)
    for desk in desks:
        await desk.close()


async def test_releases_with_another_default_do_not_answer_for_each_other(engine: Engine) -> None:
    """A worker of a release whose default task is another is no worker of this one's."""
    other = replace(TASKS["default"], k=2.0)
    await works(engine, other, "default")
    capacity = await engine.capacity()
    assert capacity.digests_of("default", TASKS["default"]) == ()
    assert capacity.digests_of("default", other) == (other.served_digest(NUMERICS),)


@asynccontextmanager
async def answering(data_dir: Path, labels: Sequence[str]) -> AsyncIterator[Service]:
    """A service with a task of these labels, whose voter votes for the first."""
    publish(data_dir / "tasks", labels)
    async with serving(data_dir=data_dir, votes=lambda rows: [rows, 0, 0]) as service:
        await service.catalog.refresh()
        service.serve("pets")
        yield service


@pytest.mark.parametrize("later", [BIRDS, (*BIRDS, "car")], ids=["other words", "more words"])
async def test_an_ended_job_of_a_replaced_bundle_is_not_found(
    tmp_path: Path, later: tuple[str, ...]
) -> None:
    """Neither it nor a repeat under its Idempotency-Key is answered in the words that came later;
    a new question is."""
    async with answering(tmp_path, DOGS) as service:
        first: dict[str, Any] = {"headers": {"Idempotency-Key": "k"}, "task": "pets"}
        answered = (await service.ask(**first)).json()
        assert answered["label"] == "dog"
        assert (await service.ask(**first)).json()["label"] == "dog"
        publish(tmp_path / "tasks", later)
        await service.catalog.refresh()
        service.serve("pets")
        service.voter.votes = lambda rows: [rows, *[0] * (len(later) - 1)]
        for response in (
            await service.client.get(f"/jobs/{answered['id']}"),
            await service.ask(**first),
        ):
            problem(response, 404, "not-found")
        stream = await service.client.get(f"/jobs/{answered['id']}/events")
        assert "event: problem" in stream.text
        assert (await service.ask(task="pets")).json()["label"] == "bird"


async def test_models_are_ready_where_their_own_bundle_is_served(tmp_path: Path) -> None:
    """/models says of a task whose name alone is served that it is not ready."""

    def pets(response: httpx.Response) -> tuple[str | None, bool]:
        (listed,) = [each for each in response.json()["models"] if each["task"] == "pets"]
        return listed["bundle"], listed["ready"]

    async with answering(tmp_path, DOGS) as service:
        served = service.voter.bundles["pets"]
        await service.until("/models", lambda found: pets(found) == (served, True))
        service.voter.bundles["pets"] = "e" * 64
        await service.until("/models", lambda found: pets(found) == (None, False))
