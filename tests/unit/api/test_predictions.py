from __future__ import annotations

import asyncio
import re

import pytest

from models.certificates.alpha import alpha_shares
from models.certificates.norms import attack_norms
from models.certificates.rules import certify
from service.jobs import Domain, noise_key
from tests.support.http import events
from tests.support.paths import ROOT
from tests.support.serving import (
    DIGEST,
    LABELS,
    PIXELS,
    RESOLUTION,
    SECRET,
    TASKS,
    Service,
    problem,
    serving,
    split,
)

STATIC = ROOT / "service" / "api" / "static"


async def test_certify_answers_in_full(service: Service) -> None:
    """A form with an image alone is answered with every documented field, exactly."""
    answered = (await service.ask()).json()
    proven = certify(
        [10, 0, 90, 0],
        [100, 0, 900, 0],
        0.25,
        0.001,
        total_variation=192 * 1260 * 2**-62,
    )
    assert isinstance(answered.pop("id"), str)
    assert set(answered.pop("timing_ms")) == {"queue", "inference", "total"}
    assert set(answered.pop("certificate")) == {"document", "jws"}
    assert answered == {
        "task": "default",
        "mode": "certify",
        "label": "cat",
        "label_index": 2,
        "labels": list(LABELS),
        "runner_up": "ant",
        "abstained": False,
        "certified": True,
        "radius": proven.radius,
        "attack_norms": attack_norms(proven.radius, (3, RESOLUTION, RESOLUTION)),
        "abstention": None,
        "sigma": 0.25,
        "alpha": 0.001,
        "n0": 100,
        "n": 1000,
        "rows_used": 1100,
        "p_lower": proven.p_lower,
        "p_upper": proven.p_upper,
        "target_radius": None,
        "target_reached": None,
        "counts": [{"label": "cat", "count": 900}, {"label": "ant", "count": 100}],
        "method": "two-sided",
        "alpha_shares": alpha_shares("two-sided", 0.001),
        "looks": [],
        "stages": None,
        "resolution": RESOLUTION,
        "bundle": DIGEST,
    }


async def test_predict_has_no_radius(service: Service) -> None:
    """Predict mode takes 100 rows, no selection, and answers without radius or certificate."""
    answered = (await service.ask(mode="predict")).json()
    assert (answered["label"], answered["n0"], answered["n"]) == ("cat", 0, 100)
    assert (answered["rows_used"], answered["radius"], answered["p_lower"]) == (100, None, None)
    assert answered["certified"] is False
    assert {lease.shard.domain for lease in service.voter.leases} == {Domain.ESTIMATION}


@pytest.mark.parametrize(("mode", "radius"), [("certify", 0.0), ("predict", None)])
async def test_abstention_is_an_answer(mode: str, radius: float | None) -> None:
    """Votes too close to call are a 200 without a label, certified nothing."""
    async with serving(votes=split) as service:
        response = await service.ask(mode=mode)
    answered = response.json()
    assert response.status_code == 200
    assert (answered["label"], answered["label_index"], answered["abstained"]) == (None, None, True)
    assert (answered["radius"], answered["certified"]) == (radius, False)
    assert sum(vote["count"] for vote in answered["counts"]) == answered["n"]
    assert answered["abstention"] == {"reason": "too_close", "rows_needed": None}
    assert answered["attack_norms"] is None


async def test_too_few_rows_name_those_that_would_do() -> None:
    """An abstention by few rows names n, and asking with it is answered."""
    async with serving(votes=lambda rows: [2 * rows // 5, 0, rows - 2 * rows // 5, 0]) as service:
        told = (await service.ask(n="50")).json()["abstention"]
        assert told["reason"] == "too_few_rows"
        again = (await service.ask(n=str(told["rows_needed"] + 20))).json()
    assert (again["label"], again["abstention"]) == ("cat", None)


async def test_the_job_is_what_was_asked(service: Service) -> None:
    """The worker gets the image's exact pixels, the served digest and the trial's own noise key."""
    await service.ask(sigma="0.5", n="200", n0="10", alpha="0.01")
    job = service.voter.leases[0].job
    pixels = PIXELS.transpose(2, 0, 1).tobytes()
    assert (job.pixels, job.shape, job.bundle, job.classes) == (pixels, (3, 8, 8), DIGEST, 4)
    assert (job.sigma, job.alpha, job.n0, job.n) == (0.5, 0.01, 10, 200)
    assert job.task_digest == TASKS["default"].digest
    assert job.key == noise_key(SECRET, job)


async def test_json_is_the_same_question(service: Service) -> None:
    """A JSON body with base64 gets the answer that the form gets."""
    form, body = (await service.ask(n="300")).json(), (await service.ask_json(n=300)).json()
    for answered in (form, body):
        del answered["id"], answered["timing_ms"]
    assert form == body


async def test_respond_async(service: Service) -> None:
    """Prefer: respond-async is accepted with a Location, whose job comes to the same answer."""
    service.voter.open.clear()
    response = await service.ask(headers={"Prefer": "respond-async"}, n="200")
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    location = response.headers["location"]
    assert location == f"/jobs/{response.json()['id']}"
    job = response.json()
    assert (job["state"], job["result"], job["problem"], job["rows"]) == ("queued", None, None, 300)
    running = await service.until_state(location, "running")
    assert running["progress"] == 0.0
    service.voter.open.set()
    job = await service.until_state(location, "succeeded")
    assert (job["progress"], job["rows_done"]) == (1.0, 300)
    assert (job["result"]["label"], job["result"]["id"]) == ("cat", job["id"])


async def test_wait_then_async(service: Service) -> None:
    """With respond-async and a wait, a quick answer comes at once and a slow one as a job."""
    prefer = {"Prefer": "respond-async, wait=1"}
    assert (await service.ask(headers=prefer)).status_code == 200
    service.voter.open.clear()
    assert (await service.ask(headers=prefer)).status_code == 202


async def test_deadline_names_the_job(service: Service) -> None:
    """A wait that ends first is a 504 with the job's id, and the job goes on to its answer."""
    service.voter.open.clear()
    response = await service.ask(headers={"Prefer": "wait=1"})
    document = problem(response, 504, "deadline")
    service.voter.open.set()
    job = await service.until_state(f"/jobs/{document['job']}", "succeeded")
    assert job["result"]["label"] == "cat"


async def test_delete_forgets(service: Service) -> None:
    """DELETE answers 204, and the job is gone, as is the work that was left of it."""
    service.voter.open.clear()
    accepted = await service.ask(headers={"Prefer": "respond-async"})
    response = await service.client.delete(accepted.headers["location"])
    assert (response.status_code, response.content) == (204, b"")
    problem(await service.client.get(accepted.headers["location"]), 404, "not-found")
    problem(await service.client.delete(accepted.headers["location"]), 404, "not-found")
    assert (await service.engine.capacity()).backlog_rows == 0


async def test_failed_job_tells_its_problem(service: Service) -> None:
    """A job that failed answers with its own problem and status, waiting or asked later."""
    service.voter.fails = True
    document = problem(await service.ask(), 500, "internal")
    assert document["detail"] == "the device is broken"
    job = (await service.client.get(f"/jobs/{document['job']}")).json()
    assert (job["state"], job["result"], job["problem"]) == ("failed", None, document)


async def test_events_end_with_the_result(service: Service) -> None:
    """The stream shows progress that never falls and ends with the job's own answer."""
    service.voter.open.clear()
    accepted = await service.ask(headers={"Prefer": "respond-async"})
    location = accepted.headers["location"]
    streaming = asyncio.create_task(service.client.get(f"{location}/events"))
    await asyncio.sleep(0.02)
    service.voter.open.set()
    response = await streaming
    assert response.headers["content-type"].startswith("text/event-stream")
    *progress, (last, result) = events(response.text)
    assert {name for name, _ in progress} == {"progress"}
    done = [data["progress"] for _, data in progress]
    assert done == sorted(done)
    assert set(progress[0][1]) == {"state", "progress", "rows_done", "rows"}
    assert last == "result"
    assert result == (await service.client.get(location)).json()["result"]


async def test_events_of_a_failed_job_end_with_its_problem(service: Service) -> None:
    """The stream of a job without an answer ends with the problem document."""
    service.voter.fails = True
    accepted = await service.ask(headers={"Prefer": "respond-async"})
    location = accepted.headers["location"]
    name, document = events((await service.client.get(f"{location}/events")).text)[-1]
    assert (name, document["detail"]) == ("problem", "the device is broken")
    problem(await service.client.get("/jobs/unknown/events"), 404, "not-found")


async def test_models(service: Service) -> None:
    """/models tells what can be asked and how."""
    found = (await service.client.get("/models")).json()
    words = {denoiser["name"]: denoiser["words"] for denoiser in found["denoisers"]}
    assert words["if-ii-l"] is None
    assert {"cat", "kitten", "ship"} < set(words["nano"])
    assert found["models"] == [
        {
            "task": "default",
            "name": "",
            "id": "small",
            "labels": list(LABELS),
            "resolution": RESOLUTION,
            "denoiser": "fake-denoiser",
            "classifier": "fake-classifier",
            "licence": "none",
            "k": 1.8,
            "largest_sigma": 1.0,
            "bundle": DIGEST,
            "ready": True,
        }
    ]


async def test_unknown_addresses_and_methods(service: Service) -> None:
    """A 404 and a 405 are problem documents, and the 405 names what is allowed."""
    problem(await service.client.get("/nowhere"), 404, "not-found")
    response = await service.client.put("/predict")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


async def test_unforeseen_errors_tell_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the service is a 500 without a word of its cause."""

    async def status(job_id: str) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(service.engine, "status", status)
    response = await service.client.get("/jobs/x")
    problem(response, 500, "internal")
    assert "secret detail" not in response.text


async def test_interface_is_described(service: Service) -> None:
    """OpenAPI has title, version, both body formats and the problems; /docs shows it."""
    described = (await service.client.get("/openapi.json")).json()
    assert described["info"]["title"] == "Vouchsafe"
    operation = described["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    for status in ("401", "413", "415", "422", "503", "504"):
        assert "application/problem+json" in operation["responses"][status]["content"]
    assert {"/jobs/{id}", "/jobs/{id}/events", "/models", "/readyz"} <= set(described["paths"])
    assert "openapi.json" in (await service.client.get("/docs")).text


async def test_page_is_self_contained(service: Service) -> None:
    """The page loads its own files alone, which its policy enforces, and modules of one release."""
    response = await service.client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "Certified" in response.text
    modules = [path.name for path in (STATIC / "modules").glob("*.js")]
    loaded = re.findall(r'(?:src|<link[^>]* href)="([^"]+)"', response.text)
    assert len(loaded) > 3
    for address in (*loaded, *(f"static/modules/{name}" for name in modules)):
        file = await service.client.get(f"/{address}")
        assert (file.status_code, file.headers["cache-control"]) == (200, "no-cache"), address
        imported = re.findall(r'from "\./([^"]+)"', file.text) if "modules" in address else []
        assert set(imported) <= set(modules)
    assert response.text.count("style=") == response.text.count("onclick=") == 0
