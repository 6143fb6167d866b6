"""POST /demonstrations: fields, documents, refusals, owners, costs."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from typing import Any

import httpx
import pytest

from models.bundle import Base
from models.demonstrations.limits import Demonstration
from service.jobs import Domain, Mode, noise_key
from service.predictions.demonstrations import LARGEST_RESOLUTION, DemonstrationRequest
from tests.support.metrics import counted
from tests.support.serving import DIGEST, PNG, SECRET, TASKS, Service, problem, serving

PICTURE = "data:image/png;base64,iVBORw0KGgo="
SAMPLE = {"noisy": PICTURE, "denoised": PICTURE, "label": 2}
ROWS = {"seen": PICTURE, "samples": [SAMPLE] * 6}
ATTACK = {"seen": PICTURE, "image": PICTURE, "l2": 0.497, "steps": 20}
ANN = {"Authorization": "Bearer key-of-ann"}
BOB = {"Authorization": "Bearer key-of-bob"}


async def ask(service: Service, headers: Any = None, **fields: Any) -> httpx.Response:
    """POST /demonstrations as a form."""
    return await service.client.post(
        "/demonstrations", files={"image": ("i", PNG)}, data=fields, headers=headers
    )


async def test_rows_are_answered_in_full(service: Service) -> None:
    """Each row has its own label by name; nothing is said beyond a row."""
    service.voter.result = json.dumps(ROWS).encode()
    response = await ask(service, sigma="0.5")
    answered = response.json()
    assert response.status_code == 200
    assert isinstance(answered.pop("id"), str)
    assert answered == {
        "status": "done",
        "kind": "rows",
        "task": "default",
        "sigma": 0.5,
        "resolution": 8,
        "rows": 6,
        "seen": PICTURE,
        "samples": [SAMPLE | {"label": "cat"}] * 6,
    }


async def test_attack_is_answered_in_full(service: Service) -> None:
    """As JSON too: the image, its distance and the limit; no label at all."""
    service.voter.result = json.dumps(ATTACK).encode()
    body = {"image": b64encode(PNG).decode(), "kind": "attack", "epsilon": 0.5}
    answered = (await service.client.post("/demonstrations", json=body)).json()
    found = (await service.client.get(f"/demonstrations/{answered['id']}")).json()
    assert found == answered
    assert isinstance(answered.pop("id"), str)
    assert answered == {
        "status": "done",
        "kind": "attack",
        "task": "default",
        "sigma": 0.25,
        "resolution": 8,
        "epsilon": 0.5,
        "rows": 8 + 2 * 20 * 3,
        **ATTACK,
    }


async def test_no_key_of_a_certificate(service: Service) -> None:
    """The same request has another random key each time: it is of no question's rows."""
    service.voter.result = json.dumps(ROWS).encode()
    await ask(service)
    await ask(service)
    await service.ask()
    first, second, question = {lease.job.id: lease.job for lease in service.voter.leases}.values()
    assert question.key == noise_key(SECRET, question)
    named = {noise_key(SECRET, replace(question, mode=mode, n0=0, n=6)) for mode in Mode}
    assert len({first.key, second.key, question.key, bytes(32)} | named) == 4 + len(named)
    assert len(first.key) == 32
    shards = [lease.shard for lease in service.voter.leases if lease.job is first]
    assert [(shard.domain, shard.rows) for shard in shards] == [(Domain.ESTIMATION, 6)]


async def test_demonstrations_and_jobs_have_their_own_addresses(service: Service) -> None:
    """Neither is found at the other's address, and a demonstration has no certificate."""
    service.voter.result = json.dumps(ROWS).encode()
    shown, job = (await ask(service)).json()["id"], (await service.ask()).json()["id"]
    for path in (f"/jobs/{shown}", f"/jobs/{shown}/events", f"/demonstrations/{job}"):
        problem(await service.client.get(path), 404, "not-found")
    problem(await service.client.delete(f"/jobs/{shown}"), 404, "not-found")
    problem(await service.client.delete(f"/demonstrations/{job}"), 404, "not-found")
    problem(await service.client.get(f"/certificates/{shown}"), 404, "not-found")
    assert (await service.client.delete(f"/demonstrations/{shown}")).status_code == 204
    problem(await service.client.get(f"/demonstrations/{shown}"), 404, "not-found")


@pytest.mark.parametrize("prefer", ["respond-async", "wait=1"])
async def test_what_is_not_ready_in_time_is_accepted(service: Service, prefer: str) -> None:
    """202 with the address at which the pictures are once they are made."""
    service.voter.open.clear()
    accepted = await ask(service, {"Prefer": prefer}, kind="attack", epsilon="0.5")
    assert accepted.status_code == 202
    unfinished = accepted.json()
    assert accepted.headers["location"] == f"/demonstrations/{unfinished['id']}"
    assert ("preference-applied" in accepted.headers) is (prefer == "respond-async")
    assert unfinished["status"] in ("queued", "running")
    assert set(unfinished) == {
        "id", "status", "kind", "task", "sigma", "resolution", "epsilon", "rows"
    }  # fmt: skip
    service.voter.result = json.dumps(ATTACK).encode()
    service.voter.open.set()
    location = accepted.headers["location"]
    done = await service.until(location, lambda found: found.json()["status"] == "done")
    assert done.json()["l2"] == 0.497


async def test_failure_is_a_problem(service: Service) -> None:
    """Of POST its status; at its address the demonstration failed, with the same problem."""
    service.voter.fails = True
    before = counted("vouchsafe_demonstrations_total", kind="rows", outcome="failed")
    response = await ask(service, {"Idempotency-Key": "k"})
    assert response.status_code == 500
    failed = response.json()
    assert failed["detail"] == "the device is broken"
    found = (await service.client.get(f"/demonstrations/{failed['job']}")).json()
    assert (found["status"], found["problem"]) == ("failed", failed)
    after = counted("vouchsafe_demonstrations_total", kind="rows", outcome="failed")
    assert after == before + 1


async def test_demonstrations_belong_to_their_key() -> None:
    """Another key finds nothing, and a key is needed."""
    async with serving(api_keys="ann:key-of-ann,bob:key-of-bob") as service:
        service.voter.result = json.dumps(ROWS).encode()
        location = f"/demonstrations/{(await ask(service, ANN)).json()['id']}"
        problem(await ask(service), 401, "unauthorized")
        problem(await service.client.get(location, headers=BOB), 404, "not-found")
        problem(await service.client.delete(location, headers=BOB), 404, "not-found")
        assert (await service.client.get(location, headers=ANN)).status_code == 200


async def test_a_retry_finds_the_first_request(service: Service) -> None:
    """Under one Idempotency-Key; another request under it, also to /predict, is refused."""
    service.voter.result = json.dumps(ROWS).encode()
    key = {"Idempotency-Key": "once"}
    first, again = [(await ask(service, key)).json() for _ in range(2)]
    assert first == again
    problem(await ask(service, key, sigma="0.5"), 422, "idempotency-key-reused")
    problem(await service.ask(headers=key), 422, "idempotency-key-reused")


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"kind": "attack"}, "epsilon", "epsilon is missing"),
        ({"epsilon": "0.5"}, "epsilon", "epsilon = 0.5: kind rows has no epsilon"),
        ({"kind": "attack", "epsilon": "0.003"}, "epsilon", "greater than or equal to 0.004"),
        ({"kind": "attack", "epsilon": "17"}, "epsilon", "less than or equal to 16"),
        ({"kind": "attack", "epsilon": "nan"}, "epsilon", "finite"),
        ({"kind": "bars"}, "kind", "'rows' or 'attack'"),
        ({"sigma": "1.5"}, "sigma", 'sigma = 1.5: the task "default" supports at most 1'),
        ({"sigma": ["0.5", "0.25"]}, "sigma", "valid number"),
        ({"n": "10"}, "n", "there is no field 'n'"),
    ],
)
async def test_unfit_fields_are_refused(
    service: Service, fields: dict[str, Any], field: str, words: str
) -> None:
    """By the field, its value and its limit."""
    document = problem(await ask(service, **fields), 422, "invalid-field")
    assert document["errors"][0]["field"] == field
    assert words in document["detail"]


@pytest.mark.parametrize(
    ("changed", "kind", "field", "words"),
    [
        ({"classifier": Base("onnx")}, "attack", "kind", "kind onnx, which gives no gradients"),
        ({"resolution": LARGEST_RESOLUTION + 1}, "rows", "task", "281 pixels a side"),
    ],
)
async def test_unfit_tasks_are_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], kind: str, field: str, words: str
) -> None:
    """Before the image is decoded, by the task's name and what it lacks."""
    monkeypatch.setitem(TASKS, "default", replace(TASKS["default"], **changed))
    fields = {"epsilon": "0.5"} if kind == "attack" else {}
    async with serving(background_tasks=[]) as service:
        document = problem(await ask(service, kind=kind, **fields), 422, "invalid-field")
    assert document["errors"][0]["field"] == field
    assert words in document["detail"]


async def test_rows_are_charged() -> None:
    """An attack above the limit of rows is refused, by its kind; rows fit."""
    async with serving(backlog_rows=127) as service:
        service.voter.result = json.dumps(ROWS).encode()
        document = problem(await ask(service, kind="attack", epsilon="1"), 422, "invalid-field")
        assert document["detail"] == "kind = attack makes 128 rows: at most 127 may wait"
        assert document["errors"][0]["field"] == "kind"
        assert (await ask(service)).status_code == 200
    assert [kind.charge for kind in Demonstration] == [6, 128]


async def test_waiting_attack_is_in_the_queue(service: Service) -> None:
    """All its rows count, at the priority of certifications."""
    service.voter.open.clear()
    await ask(service, {"Prefer": "respond-async"}, kind="attack", epsilon="1")
    assert (await service.engine.stats()).priorities["lo"].rows == 128
    assert (await service.engine.capacity()).backlog_rows == 128


def test_requests_differ_in_every_field() -> None:
    """The fingerprint of an Idempotency-Key is of the kind, sigma, epsilon, task and image."""
    plain = {"image": PNG, "kind": "attack", "epsilon": 0.5}
    changes: list[dict[str, Any]] = [
        {}, {"sigma": 0.3}, {"epsilon": 0.6}, {"task": "a"}, {"image": b"a"},
        {"kind": "rows", "epsilon": None},
    ]  # fmt: skip
    found = {DemonstrationRequest.model_validate(plain | each).fingerprint() for each in changes}
    assert len(found) == len(changes)


async def test_a_key_is_drawn_for_a_served_bundle(service: Service) -> None:
    """The job is bound to the digest that workers serve, as a question is."""
    service.voter.result = json.dumps(ROWS).encode()
    await ask(service)
    assert {lease.job.bundle for lease in service.voter.leases} == {DIGEST}
