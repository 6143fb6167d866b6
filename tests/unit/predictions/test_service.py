from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.config import Settings
from service.engine.protocol import Engine, Worker
from service.errors import TaskNotReady
from service.jobs import JobStatus, State
from service.predictions import results as answers
from service.predictions import waiting
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from tests.support.engines import HARNESSES
from tests.support.fakes import EngineSpy
from tests.support.http import ANN, BOB
from tests.support.serving import KEYS, PNG, SECRET, TASKS, Service, png, problem, serving
from tests.support.working import soon


async def test_waiting_caller_hears_of_the_cancellation(service: Service) -> None:
    """Who waits for a job that is cancelled meanwhile gets a 409 at once."""
    service.voter.open.clear()
    waiting = asyncio.create_task(service.ask())
    await service.voter.busy.wait()
    job_id = service.voter.leases[0].job.id
    await service.engine.cancel(job_id)
    assert problem(await waiting, 409, "cancelled")["job"] == job_id
    job = (await service.client.get(f"/jobs/{job_id}")).json()
    assert (job["state"], job["problem"]["status"]) == ("cancelled", 409)


async def hang_up(service: Service, headers: dict[str, str]) -> None:
    """POST /predict over bare ASGI, and leave once the job is in the engine."""
    request = service.client.build_request(
        "POST", "/predict", files={"image": ("i", PNG)}, headers=headers
    )
    body = [{"type": "http.request", "body": request.read(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if body:
            return body.pop()
        await service.voter.busy.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("service", 80),
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
    }
    async with asyncio.timeout(5):
        await service.app(scope, receive, send)


async def test_leaving_cancels(service: Service) -> None:
    """A caller who hangs up while waiting frees the rows that were left."""
    service.voter.open.clear()
    await hang_up(service, {})
    assert service.voter.leases
    assert (await service.engine.capacity()).backlog_rows == 0


async def test_leaving_with_an_idempotency_key_does_not(service: Service) -> None:
    """A caller with an Idempotency-Key may lose the connection and come back for the answer."""
    service.voter.open.clear()
    leaving = asyncio.create_task(hang_up(service, {"Idempotency-Key": "k"}))
    await service.voter.busy.wait()
    await asyncio.sleep(0.05)
    service.voter.open.set()
    retried = await service.ask(headers={"Idempotency-Key": "k"})
    await leaving
    assert retried.json()["label"] == "cat"
    assert len({lease.job.id for lease in service.voter.leases}) == 1


async def test_idempotency(service: Service) -> None:
    """A retry under the same key is the same job, in either format; another body is a 422."""
    headers = {"Idempotency-Key": "k" * 255}
    first = await service.ask(headers=headers, n="200")
    assert (await service.ask(headers=headers, n="200")).json() == first.json()
    assert (await service.ask_json(headers=headers, n=200)).json() == first.json()
    other = await service.ask(headers=headers, n="300")
    problem(other, 422, "idempotency-key-reused")
    assert (await service.ask(n="200")).json()["id"] != first.json()["id"]
    too_long = await service.ask(headers={"Idempotency-Key": "k" * 256})
    (error,) = problem(too_long, 422, "invalid-field")["errors"]
    assert (error["limit"], "idempotency-key" in error["field"]) == (255, True)


async def test_retry_is_answered_though_the_backlog_is_full() -> None:
    """A retry adds no rows, so a full backlog does not keep it from its answer."""
    async with serving(backlog_rows=400) as service:
        first = await service.ask(headers={"Idempotency-Key": "k"}, n="100")
        service.voter.open.clear()
        await service.ask(headers={"Prefer": "respond-async"}, n="300")
        problem(await service.ask(n="100"), 503, "backlog")
        problem(await service.ask(headers={"Idempotency-Key": "new"}, n="100"), 503, "backlog")
        again = await service.ask(headers={"Idempotency-Key": "k"}, n="100")
        assert again.json() == first.json()


async def test_jobs_belong_to_their_key() -> None:
    """Jobs and Idempotency-Keys of another key do not exist for a caller."""
    async with serving(api_keys="ann:key-of-ann,bob:key-of-bob") as service:
        first = await service.ask(headers=ANN | {"Idempotency-Key": "k"})
        path = f"/jobs/{first.json()['id']}"
        assert (await service.client.get(path, headers=ANN)).status_code == 200
        problem(await service.client.get(path, headers=BOB), 404, "not-found")
        problem(await service.client.get(f"{path}/events", headers=BOB), 404, "not-found")
        problem(await service.client.delete(path, headers=BOB), 404, "not-found")
        second = await service.ask(headers=BOB | {"Idempotency-Key": "k"}, n="100")
        assert second.json()["id"] != first.json()["id"]


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"sigma": "5"}, "sigma", 4.0),
        ({"sigma": "1.5"}, "sigma", 1.0),
        ({"sigma": "many"}, "sigma", None),
        ({"n": "100001"}, "n", 100_000),
        ({"n": "10"}, "n", 11),
        ({"n": "9", "method": "cohen"}, "n", 10),
        ({"n": "10", "mode": "predict"}, "n", 11),
        ({"n": "10000"}, "n", 10_000),
        ({"alpha": "1e-200"}, "alpha", None),
        ({"mode": "purify"}, "mode", None),
    ],
)
async def test_bad_fields_are_named(
    service: Service, fields: dict[str, str], field: str, limit: float | None
) -> None:
    """Each bad field is a 422 that names the field, its value and its limit."""
    document = problem(await service.ask(**fields), 422, "invalid-field")
    (error,) = document["errors"]
    assert error["field"] == field
    assert str(error["value"]) == str(type(error["value"])(fields[field]))
    assert error.get("limit") == limit
    assert field in document["detail"]


async def test_unknown_fields_are_named(service: Service) -> None:
    """A field that does not exist is a 422 that names it and the fields that there are."""
    document = problem(await service.ask(purify="1"), 422, "invalid-field")
    (error,) = document["errors"]
    assert error["field"] == "purify"
    assert "purify" in document["detail"]
    assert "sigma" in document["detail"]


@pytest.mark.parametrize(
    ("method", "smallest"), [("two-sided", 11), ("anytime", 11), ("cohen", 10), ("binomial", 11)]
)
async def test_hopeless_questions_name_the_smallest_n(
    service: Service, method: str, smallest: int
) -> None:
    """An n that could only ever abstain is refused with the smallest that works, which does."""
    fields = {"method": method, "mode": "predict" if method == "binomial" else "certify"}
    refused = await service.ask(**fields, n=str(smallest - 1))
    assert (
        f"smallest n that works is {smallest}" in problem(refused, 422, "invalid-field")["detail"]
    )
    assert (await service.ask(**fields, n=str(smallest))).status_code == 200


async def test_unknown_task_names_the_known(service: Service) -> None:
    """An unknown task is a 404 that lists the tasks."""
    document = problem(await service.ask(task="birds"), 404, "not-found")
    assert document["tasks"] == ["default"]


@pytest.mark.parametrize(
    ("image", "status", "slug"),
    [
        (b"hello", 415, "unsupported-media-type"),
        (b"", 422, "invalid-image"),
        (PNG[:60], 422, "invalid-image"),
        (png(np.zeros((200, 200, 3), np.uint8)), 413, "too-large"),
        (b"x" * 70_000, 413, "too-large"),
        (b"x" * 200_000, 413, "too-large"),
    ],
)
async def test_bad_images_are_problems(image: bytes, status: int, slug: str) -> None:
    """What is no image, broken, or too large in pixels or bytes gets its own problem."""
    async with serving(max_image_pixels=10_000, max_image_bytes=65_536) as service:
        problem(await service.ask(image), status, slug)


async def test_backlog_refuses_by_rows_before_decoding() -> None:
    """Rows that do not fit are a 503 with Retry-After, before the image is even looked at."""
    async with serving(backlog_rows=1500) as service:
        service.voter.open.clear()
        await service.ask(headers={"Prefer": "respond-async"})
        response = await service.ask(image=b"no image")
        problem(response, 503, "backlog")
        assert int(response.headers["retry-after"]) >= 1


async def test_quota_refuses_one_key_before_decoding() -> None:
    """A key whose rows would pass its quota gets a 429 with Retry-After; another is let in."""
    async with serving(api_keys="ann:a,bob:b", max_queue_rows_per_key=1500) as service:
        service.voter.open.clear()
        ann, bob = ({"Authorization": f"Bearer {key}"} for key in "ab")
        asked = await service.ask(headers=ann | {"Prefer": "respond-async"})
        assert asked.status_code == 202
        response = await service.ask(image=b"no image", headers=ann)
        assert problem(response, 429, "quota")["limit"] == 1500
        assert int(response.headers["retry-after"]) >= 1
        other = await service.ask(headers=bob | {"Prefer": "respond-async"})
        assert other.status_code == 202
        too_much = await service.ask(headers=bob, n="2000")
        assert problem(too_much, 422, "invalid-field")["errors"][0]["limit"] == 1500


async def test_no_worker_refuses_before_decoding() -> None:
    """Without a live worker a question is a 503 with Retry-After, and the models say so."""
    async with serving(background_tasks=[]) as service:
        response = await service.ask(image=b"no image")
        problem(response, 503, "backlog")
        assert int(response.headers["retry-after"]) >= 1
        (model,) = (await service.client.get("/models")).json()["models"]
        assert (model["ready"], model["bundle"]) == (False, None)


def test_total_variation_leaves_the_radius_nearly_whole() -> None:
    """The bound on the noise's total variation costs a 224 pixel image less than 1e-8."""
    assert answers.total_variation((3, 224, 224), 0.25) < 1e-8


# A task that changes as it is asked

LATER = replace(TASKS["default"], k=2.0)
SHAPE = {"batch_rows": 16}


@pytest.fixture(params=HARNESSES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """An engine of workers of the task that `Replacing` has at first, and of the one that comes."""
    harness = HARNESSES[request.param](request)
    for worker, bundle in (("first", TASKS["default"]), ("later", LATER)):
        digest = bundle.served_digest(SHAPE)
        await harness.engine.pull(Worker(worker, {"default": digest}, [SHAPE]), 0)
    yield harness.engine
    await harness.close()


class Replacing(EngineSpy):
    """An engine beside which the default task is replaced as it takes the first job."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.tasks = dict(TASKS)

    def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        return self.engine.watch(job_id)

    async def submit(self, *asked: Any, **more: Any) -> str:
        job_id = await self.engine.submit(*asked, **more)
        if self.tasks["default"] is TASKS["default"]:
            self.tasks["default"] = LATER
        return job_id


async def test_a_task_that_changes_as_it_is_asked_is_another_question(
    engine: Engine, tmp_path: Path
) -> None:
    """Where the bundle is replaced while the question is on its way, the caller is told to ask
    again, and nothing is kept that a key would repeat."""
    spy = Replacing(engine)
    desk = Predictions(Settings(data_dir=tmp_path), spy, spy.tasks, SECRET, KEYS)
    asked = PredictRequest.model_validate({"image": png(), "n": 30, "n0": 10})
    with pytest.raises(TaskNotReady, match='"default" changed meanwhile; send the request') as told:
        await desk.submit(asked, "ada", "key")
    assert told.value.retry_after == 1
    assert (await engine.capacity()).backlog_rows == 0
    job_id = await desk.submit(asked, "ada", "key")
    assert (await desk.status(job_id, "ada")).state is State.QUEUED
    await desk.close()


async def test_what_is_to_be_asked_again_is_forgotten_after_an_outage(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine is out of reach just then, the key is free once it answers again."""
    monkeypatch.setattr(waiting, "_UNREACHABLE_SECONDS", 0.01)
    spy = Replacing(engine)
    spy.trouble = lambda: spy.calls[-1][0] == "delete" and len(spy.asked("delete")) < 3
    desk = Predictions(Settings(data_dir=tmp_path), spy, spy.tasks, SECRET, KEYS)
    asked = PredictRequest.model_validate({"image": png(), "n": 30, "n0": 10})
    with pytest.raises(TaskNotReady):
        await desk.submit(asked, "ada", "key")
    await soon(lambda: len(spy.asked("delete")) == 3 and not desk._waiter._deleting)
    assert (await engine.capacity()).backlog_rows == 0
    job_id = await desk.submit(asked, "ada", "key")
    assert (await desk.status(job_id, "ada")).state is State.QUEUED
    await desk.close()
