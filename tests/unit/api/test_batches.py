"""Batches over HTTP: equal shares of alpha, a line an image, a signed manifest."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.certificates.alpha import family_share
from service.api import batches as endpoints
from service.errors import Backlog, JobLost, QuotaExceeded, TaskNotReady
from service.predictions.batches import runner
from service.predictions.question import PredictRequest
from service.signing import canonical, check_signature, signed_payload
from tests.support.http import ANN, BOB
from tests.support.serving import KEYS, PNG, Service, png, problem, serving

OTHER = png(np.zeros((8, 8, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)


async def send(
    service: Service, images: Sequence[bytes], headers: Any = None, **fields: Any
) -> httpx.Response:
    files = [("images", (f"{index}.png", image)) for index, image in enumerate(images)]
    return await service.client.post("/batches", files=files, data=fields, headers=headers)


async def accepted(service: Service, images: Sequence[bytes], **options: Any) -> str:
    """The address of a new batch."""
    response = await send(service, images, **options)
    assert response.status_code == 202, response.text
    location = response.headers["location"]
    assert location == f"/batches/{response.json()['id']}"
    return str(location)


async def results(service: Service, location: str, headers: Any = None) -> list[dict[str, Any]]:
    """The lines of a batch up to its end, by index."""
    response = await service.client.get(f"{location}/results", headers=headers)
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(each) for each in response.text.splitlines()]
    return sorted(lines, key=lambda line: int(line["index"]))


async def test_results_are_those_of_single_questions(service: Service) -> None:
    """Each line is what /predict answers to its image at alpha / m; repeats count in m."""
    images = [PNG, OTHER, PNG]
    location = await accepted(service, images, alpha="0.01", n="500")
    lines = await results(service, location)
    assert [(line["index"], line["name"]) for line in lines] == [
        (0, "0.png"), (1, "1.png"), (2, "2.png"),
    ]  # fmt: skip
    share = family_share(0.01, 3)
    for line, image in zip(lines, images, strict=True):
        alone = (await service.ask(image, alpha=repr(share), n=500)).json()
        assert line["state"] == "succeeded"
        for name in ("label", "radius", "alpha", "alpha_shares", "counts", "p_lower", "n"):
            assert line["result"][name] == alone[name], name
        document, own = (each["certificate"]["document"] for each in (line["result"], alone))
        assert document | {"service": None} == own | {"service": None}
    batch = (await service.client.get(location)).json()
    assert (batch["state"], batch["progress"]) == ("succeeded", 1.0)
    assert (batch["total"], batch["done"], batch["problem"]) == (3, 3, None)
    assert (batch["family_alpha"], batch["alpha"]) == (0.01, share)
    assert batch["finished"] >= batch["created"]


async def test_a_bad_image_is_a_problem_in_its_line(service: Service) -> None:
    """Its share goes to no other image."""
    location = await accepted(service, [b"no image", PNG])
    bad, good = await results(service, location)
    assert (bad["state"], bad["problem"]["status"]) == ("failed", 415)
    assert bad["problem"]["type"] == "urn:vouchsafe:problem:unsupported-media-type"
    assert good["result"]["alpha"] == 0.0005
    assert (await service.client.get(location)).json()["state"] == "succeeded"
    location = await accepted(service, [b"no image"])
    (bad,) = await results(service, location)
    batch = (await service.client.get(location)).json()
    assert (batch["state"], batch["problem"]) == ("failed", bad["problem"])


async def test_the_manifest_is_signed(service: Service) -> None:
    """It lists every certificate by the hash of its document, and verifies by the JWKS."""
    location = await accepted(service, [PNG, b"no image", OTHER])
    lines = await results(service, location)
    manifest = (await service.client.get(f"{location}/manifest")).json()
    jwks = (await service.client.get("/.well-known/jwks.json")).json()
    assert check_signature(manifest["jws"], jwks) == KEYS.kid
    document = manifest["document"]
    assert signed_payload(manifest["jws"])[1] == canonical(document)
    assert (document["m"], document["family_alpha"]) == (3, 0.001)
    assert document["alpha"] == family_share(0.001, 3)
    assert f"{location}" == f"/batches/{document['batch']}"
    certificates = {line["index"]: line["result"]["certificate"] for line in (lines[0], lines[2])}
    assert document["certificates"] == [
        {
            "index": index,
            "id": each["document"]["id"],
            "sha256": hashlib.sha256(signed_payload(each["jws"])[1]).hexdigest(),
        }
        for index, each in certificates.items()
    ]


async def test_lines_come_as_they_end(service: Service) -> None:
    """A reader gets a line before the batch has ended, and the manifest only after."""
    service.voter.open.clear()
    location = await accepted(service, [b"no image", PNG])
    running = service.client.build_request("GET", f"{location}/results")
    first = asyncio.Event()
    got: list[str] = []

    async def send_on(message: Any) -> None:
        if body := message.get("body"):
            got.append(body.decode())
            first.set()

    reading = asyncio.create_task(service.app(scope_of(running), silent, send_on))
    await asyncio.wait_for(first.wait(), 30)
    await service.voter.busy.wait()
    assert [json.loads(line)["index"] for line in got] == [0]
    batch = (await service.client.get(location)).json()
    assert (batch["state"], batch["done"], batch["progress"]) == ("running", 1, 0.5)
    problem(await service.client.get(f"{location}/manifest"), 404, "not-found")
    head = await service.client.head(f"{location}/results")
    assert (head.status_code, head.content) == (200, b"")
    service.voter.open.set()
    await asyncio.wait_for(reading, 30)
    assert [json.loads(line)["index"] for line in got] == [0, 1]


def scope_of(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "path": request.url.path,
        "raw_path": request.url.raw_path,
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }


async def silent() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("images", "fields", "field"),
    [
        ([PNG], {"sigma": "9"}, "sigma"),
        ([PNG], {"alpha": "0.7"}, "alpha"),
        ([PNG], {"colour": "red"}, "colour"),
        ([PNG], {"n": "20000"}, "n"),
        ([PNG] * 1000, {"n": "10"}, "n"),
        ([], {"images": "text"}, "images"),
        ([], {"n": "10"}, "images"),
    ],
)
async def test_fields_are_checked_before_any_work(
    service: Service, images: list[bytes], fields: dict[str, str], field: str
) -> None:
    """A field that no image's question may have is a 422 that names it, as is a missing image."""
    files = [("images", ("i.png", image)) for image in images] or [("image", ("i.png", PNG))]
    response = await service.client.post("/batches", files=files, data=fields)
    assert problem(response, 422, "invalid-field")["errors"][0]["field"] == field


async def test_a_share_demands_more_rows(service: Service) -> None:
    """n = 11 is enough for one image, not for two: the limit is that of the share."""
    await accepted(service, [PNG], n="11")
    refused = await send(service, [PNG, OTHER], n="11")
    assert problem(refused, 422, "invalid-field")["errors"][0]["limit"] == 12


async def test_too_much_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many files, and too many bytes, are a 413 with the limit."""
    monkeypatch.setattr(endpoints, "MOST_IMAGES", 2)
    assert problem(await send(service, [PNG] * 3), 413, "too-large")["limit"] == 2
    monkeypatch.setattr(endpoints, "MOST_BYTES", 1000)
    assert problem(await send(service, [b"x" * 1000]), 413, "too-large")["limit"] == 1000
    response = await service.client.post("/batches", json={"images": []})
    problem(response, 415, "unsupported-media-type")


async def test_names_are_bounded(service: Service) -> None:
    """The names of open batches are read again and again; none may be longer than a file's."""
    for length, status in ((255, 202), (256, 422)):
        files = [("images", ("n" * length, PNG))]
        response = await service.client.post("/batches", files=files)
        assert response.status_code == status
    (error,) = problem(response, 422, "invalid-field")["errors"]
    assert (error["field"], error["value"], error["limit"]) == ("images", 256, 255)


def test_the_limits_are_those_of_the_reference() -> None:
    """1,000 images and 100 MB."""
    assert (endpoints.MOST_IMAGES, endpoints.MOST_BYTES) == (1000, 100_000_000)


async def test_deleted_batches_leave_nothing(tmp_path: Path) -> None:
    """Jobs end, the folder goes, and the stream of results with it."""
    async with serving(data_dir=tmp_path) as service:
        service.voter.open.clear()
        location = await accepted(service, [PNG, OTHER])
        reading = asyncio.create_task(results(service, location))
        await service.voter.busy.wait()
        await service.until(location, lambda found: found.json()["state"] == "running")
        job_id = service.voter.leases[0].job.id
        deleted = await service.client.delete(location)
        assert deleted.status_code == 204
        assert await asyncio.wait_for(reading, 30) == []
        for path in (location, f"{location}/results", f"{location}/manifest", f"/jobs/{job_id}"):
            problem(await service.client.get(path), 404, "not-found")
        problem(await service.client.delete(location), 404, "not-found")
        async with asyncio.timeout(30):
            while (await service.engine.capacity()).backlog_rows:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert [*(tmp_path / "batches").iterdir()] == []


async def test_images_go_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the jobs of a deleted batch wait for an engine that is unreachable."""
    monkeypatch.setattr(runner, "SWEEP_SECONDS", 0.01)
    async with serving(data_dir=tmp_path) as service:
        service.voter.open.clear()
        location = await accepted(service, [PNG, b"no image"])
        await service.until(location, lambda found: found.json()["done"] == 1)
        await service.voter.busy.wait()

        async def unreachable(_: str) -> bool:
            raise ConnectionError("Redis is away")

        with monkeypatch.context() as patched:
            patched.setattr(service.engine, "delete", unreachable)
            assert (await service.client.delete(location)).status_code == 204
            left = [path for path in (tmp_path / "batches").rglob("*") if path.is_file()]
            assert sorted(path.name for path in left) == ["batch.json", "jobs"]
        async with asyncio.timeout(30):
            while [*(tmp_path / "batches").iterdir()]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def test_batches_belong_to_their_key() -> None:
    """Another key's batch does not exist."""
    async with serving(api_keys="ann:key-of-ann,bob:key-of-bob") as service:
        location = await accepted(service, [PNG], headers=ANN)
        (line,) = await results(service, location, ANN)
        assert line["state"] == "succeeded"
        for path in (location, f"{location}/results", f"{location}/manifest"):
            problem(await service.client.get(path, headers=BOB), 404, "not-found")
        problem(await service.client.delete(location, headers=BOB), 404, "not-found")
        assert (await service.client.get(location, headers=ANN)).status_code == 200


async def test_a_restart_goes_on(tmp_path: Path) -> None:
    """The next process keeps the lines of the last one, and computes only the others."""
    async with serving(data_dir=tmp_path) as service:
        service.voter.open.clear()
        location = await accepted(service, [b"no image", PNG, OTHER], n="500")
        await service.voter.busy.wait()
        await service.until(location, lambda found: found.json()["done"] == 1)
        service.voter.open.set()
        await service.until(location, lambda found: found.json()["done"] >= 2)
    async with serving(data_dir=tmp_path) as service:
        before = (await service.client.get(location)).json()["done"]
        lines = await results(service, location)
        asked = {lease.job.id for lease in service.voter.leases}
        assert [line["state"] for line in lines] == ["failed", "succeeded", "succeeded"]
        assert len(asked) <= 3 - before
        assert asked == {line["result"]["id"] for line in lines[1:]} & asked
        manifest = (await service.client.get(f"{location}/manifest")).json()
        assert len(manifest["document"]["certificates"]) == 2


async def test_a_few_of_a_batch_are_open_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch leaves the backlog to others, and waits where there is no room for its rows."""
    monkeypatch.setattr(runner, "OPEN_JOBS", 2)
    monkeypatch.setattr(runner, "LONGEST_PAUSE", 0.01)
    async with serving(backlog_rows=700) as service:
        most = 0
        submit = service.engine.submit

        async def counted(*arguments: Any, **options: Any) -> str:
            nonlocal most
            job_id = await submit(*arguments, **options)
            most = max(most, (await service.engine.capacity()).backlog_rows)
            return job_id

        monkeypatch.setattr(service.engine, "submit", counted)
        images = [png(np.full((8, 8, 3), shade, dtype=np.uint8)) for shade in range(5)]
        lines = await results(service, await accepted(service, images, n="200"))
        assert [line["state"] for line in lines] == ["succeeded"] * 5
        assert most <= 600
        lines = await results(service, await accepted(service, images, n="500"))
        assert [line["state"] for line in lines] == ["succeeded"] * 5


async def test_jobs_of_a_batch_are_found_again(service: Service) -> None:
    """A line's job is at /jobs/ID; a job that its caller cancels is a cancelled line."""
    service.voter.open.clear()
    location = await accepted(service, [PNG])
    await service.voter.busy.wait()
    job_id = service.voter.leases[0].job.id
    assert (await service.client.get(f"/jobs/{job_id}")).json()["rows"] == 1100
    assert (await service.client.delete(f"/jobs/{job_id}")).status_code == 204
    (line,) = await results(service, location)
    assert (line["state"], line["problem"]["job"]) == ("cancelled", job_id)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Redis is away"),
        Backlog("full", retry_after=9),
        QuotaExceeded("much", retry_after=9),
        TaskNotReady("soon", retry_after=9),
        JobLost("gone", retry_after=9),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_passes_is_waited_out(
    service: Service, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A question that is refused for now is submitted again, under the same Idempotency-Key."""
    predictions = service.app.state.services.predictions
    submit, keys = predictions.submit, list[str]()

    async def refusing(question: Any, owner: Any, key: str) -> str:
        keys.append(key)
        if len(keys) < 3:
            raise error
        return str(await submit(question, owner, key))

    monkeypatch.setattr(predictions, "submit", refusing)
    monkeypatch.setattr(runner, "LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(runner, "_UNREACHABLE_SECONDS", 0.01)
    (line,) = await results(service, await accepted(service, [PNG]))
    assert line["state"] == "succeeded"
    assert keys == [keys[0]] * 3


async def test_a_stopping_process_ends_its_streams(service: Service) -> None:
    """The lines so far are sent, and the response ends before its batch does."""
    service.voter.open.clear()
    location = await accepted(service, [b"no image", PNG])
    reading = asyncio.create_task(results(service, location))
    await service.until(location, lambda found: found.json()["done"] == 1)
    service.app.state.services.predictions.drain(0.0)
    lines = await asyncio.wait_for(reading, 30)
    assert [line["index"] for line in lines] == [0]


async def test_a_fault_is_a_problem_in_its_line(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the service ends one image's line; the log has it, and the others go on."""
    predictions = service.app.state.services.predictions
    submit, calls = predictions.submit, 0

    async def faulty(*arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a secret reason")
        return str(await submit(*arguments))

    monkeypatch.setattr(predictions, "submit", faulty)
    lines = await results(service, await accepted(service, [PNG, OTHER]))
    states = sorted((line["state"], line.get("problem", {}).get("status")) for line in lines)
    assert states == [("failed", 500), ("succeeded", None)]
    assert "a secret reason" not in json.dumps(lines)
    assert "a secret reason" in caplog.text


async def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The caller may try again, and nothing is left of the batch."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async with serving(data_dir=tmp_path) as service:
        monkeypatch.setattr("service.predictions.batches.store.flush", full)
        refused = await send(service, [PNG])
        assert "No space left on device" in problem(refused, 503, "overloaded")["detail"]
        assert int(refused.headers["retry-after"]) >= 1
    assert [*(tmp_path / "batches").iterdir()] == []


def test_a_stored_question_is_the_sent_one() -> None:
    """Every field of a question survives its way through JSON."""
    sent = PredictRequest(image=b"", target_radius=0.25, alpha=1e-6, n=4000)
    again = PredictRequest.model_validate({**sent.model_dump(mode="json"), "image": b""})
    assert again == sent


async def test_a_retry_finds_the_batch(service: Service) -> None:
    """The same request under the same key is one batch; another request is refused."""
    headers = {"Idempotency-Key": "once"}
    first = await accepted(service, [PNG, OTHER], headers=headers)
    await results(service, first)
    again = await send(service, [PNG, OTHER], headers=headers)
    assert (again.status_code, again.headers["location"]) == (202, first)
    assert again.json()["state"] == "succeeded"
    for images, fields in (([OTHER, PNG], {}), ([PNG, OTHER], {"alpha": "0.01"})):
        odd = await send(service, images, headers=headers, **fields)
        problem(odd, 422, "idempotency-key-reused")
    other = await accepted(service, [PNG, OTHER], headers={"Idempotency-Key": "twice"})
    assert other not in (first, await accepted(service, [PNG, OTHER]))
    assert (await service.client.delete(first)).status_code == 204
    assert await accepted(service, [OTHER, PNG], headers=headers) == first
    assert [line["state"] for line in await results(service, first)] == ["succeeded"] * 2


async def test_two_retries_at_once_are_one_batch(service: Service) -> None:
    """Whichever is stored first is the batch of both."""
    headers = {"Idempotency-Key": "once"}
    sent = await asyncio.gather(*(send(service, [PNG] * 20, headers=headers) for _ in range(4)))
    assert [each.status_code for each in sent] == [202] * 4
    assert len({each.headers["location"] for each in sent}) == 1


async def test_a_batch_sent_again_shares_nothing_with_the_deleted_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for the deleted one's images answers none of the new ones, at another alpha."""
    monkeypatch.setattr(runner, "_UNREACHABLE_SECONDS", 0.1)
    predictions = service.app.state.services.predictions
    submit, refused, is_full = predictions.submit, asyncio.Event(), True

    async def refusing(*arguments: Any) -> str:
        if is_full:
            refused.set()
            raise Backlog("full")
        return str(await submit(*arguments))

    monkeypatch.setattr(predictions, "submit", refusing)
    headers = {"Idempotency-Key": "once"}
    first = await accepted(service, [PNG, OTHER], headers=headers, alpha="0.1")
    await refused.wait()
    assert (await service.client.delete(first)).status_code == 204
    again = await accepted(service, [OTHER, PNG, PNG], headers=headers, alpha="0.01")
    is_full = False
    lines = await results(service, again)
    assert again == first
    assert [line["result"]["alpha"] for line in lines] == [family_share(0.01, 3)] * 3
