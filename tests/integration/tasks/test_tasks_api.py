from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import serving as serving_process
from models.adaptation.plan import MEASURED_ON, STAGES
from models.bundle import DEFAULT_TASK
from service.operations import metrics
from service.tasks.store import Store
from tests.support.adapting import make_plan, make_store, starts, until, wait_until
from tests.support.fake_adaptation import FIGURES, GO, publish
from tests.support.http import ANN, BOB, events
from tests.support.metrics import counted
from tests.support.photographs import png
from tests.support.serving import Service, problem
from tests.support.task_service import adapting, body, idle, made

KEYS = {"api_keys": "ann:key-of-ann,bob:key-of-bob"}


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with adapting(tmp_path) as running:
        yield running


async def test_labels_become_a_task(service: Service) -> None:
    """A POST is accepted, the task runs its course, and the same POST is a 200 once it is ready."""
    accepted = await service.client.post("/tasks", json=body(name="Pets"))
    task = accepted.json()
    assert accepted.status_code == 202
    assert accepted.headers["location"] == f"/tasks/{task['id']}"
    assert (task["name"], task["state"], task["labels"]) == ("Pets", "queued", ["cat", "dog"])
    assert task["settings"] == {
        "denoiser": "nano", "classifier": "nano", "shots": 1, "seed": 0,
        "steps": make_plan().steps, "epochs": make_plan().epochs,
    }  # fmt: skip
    ready = await service.until_state(accepted.headers["location"], "ready")
    assert (ready["progress"], ready["stage"], ready["problem"]) == (1.0, None, None)
    assert ready["figures"] == {"measured_on": MEASURED_ON, **FIGURES}
    assert set(ready["losses"]) == {"synthesizing", "personalizing", "finetuning", "evaluating"}
    assert ready["created"] <= ready["started"] <= ready["finished"]
    again = await service.client.post("/tasks", json=body(name="Other"))
    assert (again.status_code, again.json() | {"finished": ready["finished"]}) == (200, ready)
    (listed,) = (await service.client.get("/tasks")).json()["tasks"]
    assert listed | {"finished": ready["finished"]} == ready


async def test_the_pictures_can_be_seen(service: Service) -> None:
    """A task names some of its pictures, each of which is a PNG file."""
    task = (await service.client.get(await made(service))).json()
    assert task["references"] == [f"/tasks/{task['id']}/references/{i}-0.png" for i in range(2)]
    picture = await service.client.get(task["references"][1])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    for name in ("9-9.png", "..%2f..%2fplan.json", "0-0.json"):
        missing = await service.client.get(f"/tasks/{task['id']}/references/{name}")
        problem(missing, 404, "not-found")


async def test_a_new_task_can_be_asked_without_a_restart(service: Service) -> None:
    """Ready means that /models lists the task and /predict takes it, as soon as a worker does."""
    task_id = (await made(service)).rpartition("/")[2]
    (listed,) = [m for m in (await service.client.get("/models")).json()["models"] if m["name"]]
    assert (listed["task"], listed["labels"]) == (task_id, ["cat", "dog"])
    service.voter.votes = lambda rows: [rows, 0]
    asking = asyncio.create_task(service.ask(task=task_id))
    await asyncio.sleep(0.1)
    service.serve(task_id)
    assert (await asking).json()["label"] == "cat"


async def test_a_task_is_named_after_its_labels(tmp_path: Path) -> None:
    """Without a name people see the first labels; order, case and template make another task."""
    async with idle(tmp_path) as service:
        labels = ["cat", "dog", "ship", "frog", "deer"]
        first = (await service.client.post("/tasks", json={"labels": labels})).json()
        second = (await service.client.post("/tasks", json={"labels": labels[::-1]})).json()
        spaced = [f" {label} " for label in labels]
        same = (await service.client.post("/tasks", json={"labels": spaced, "seed": 0})).json()
    assert first["name"] == "cat, dog, ship and 2 more"
    assert first["id"] == same["id"] != second["id"]


@pytest.mark.parametrize(
    ("fields", "field", "value", "limit"),
    [
        ({"labels": ["cat"]}, "labels", 1, 2),
        ({"labels": ["cat"] * 1001}, "labels", 1001, 1000),
        ({"labels": "cat"}, "labels", "cat", None),
        ({"labels": ["cat", 3] + [4] * 900}, "labels.1", 3, None),
        ({"labels": ["cat", "Cat"]}, "labels.1", "Cat", None),
        ({"labels": ["cat", "xylophone"]}, "labels.1", "xylophone", None),
        ({"labels": ["cat", "a\u0000b"]}, "labels.1", "a\u0000b", None),
        ({"labels": ["cat", "x" * 129]}, "labels.1", "x" * 77 + "...", 128),
        ({"template": "no place"}, "template", "no place", None),
        ({"template": "x" * 900_000}, "template", "x" * 77 + "...", 256),
        ({"shots": 0}, "shots", 0, 1),
        ({"shots": "4"}, "shots", "4", None),
        ({"steps": 10_001}, "steps", 10_001, 10_000),
        ({"epochs": -1}, "epochs", -1, 0),
        ({"seed": 2**31}, "seed", 2**31, 2**31 - 1),
        ({"denoiser": "huge"}, "denoiser", "huge", None),
        ({"denoiser": "x" * 65}, "denoiser", "x" * 65, 64),
        ({"classifier": "huge"}, "classifier", "huge", None),
        ({"name": " "}, "name", " ", None),
        ({"name": "n" * 129}, "name", "n" * 77 + "...", 128),
        ({"name": "a\nb"}, "name", "a\nb", None),
        ({"owner": "me"}, "owner", None, None),
    ],
)
async def test_bad_fields_are_named(
    tmp_path: Path, fields: dict[str, Any], field: str, value: object, limit: object
) -> None:
    """Each bad field is a short 422 that names the field, its value and its limit."""
    async with idle(tmp_path) as service:
        response = await service.client.post("/tasks", json={**body(), **fields})
    (error,) = problem(response, 422, "invalid-field")["errors"]
    assert (error["field"], error.get("value"), error.get("limit")) == (field, value, limit)
    assert len(response.content) < 3_000
    assert not (tmp_path / "jobs").exists()


async def test_unknown_labels_can_be_insisted_on(tmp_path: Path) -> None:
    """A word the set never saw is refused with the vocabulary and the way to insist."""
    async with idle(tmp_path) as service:
        unknown = body(labels=["cat", "xylophone"])
        refused = problem(await service.client.post("/tasks", json=unknown), 422, "invalid-field")
        assert "kitten" in refused["detail"]
        assert "allow_unknown_labels" in refused["detail"]
        insisted = await service.client.post(
            "/tasks", json=unknown | {"allow_unknown_labels": True}
        )
        assert insisted.status_code == 202


@pytest.mark.parametrize(
    ("kind", "content", "status", "slug"),
    [
        ("application/json", b"{", 400, "malformed-request"),
        ("application/json", b"[]", 422, "invalid-field"),
        ("application/json", b"{}", 422, "invalid-field"),
        ("application/json", b'{"labels": "' + b"x" * 2**20 + b'"}', 413, "too-large"),
        ("text/plain", b"cat", 415, "unsupported-media-type"),
        ("multipart/form-data; boundary=b", b"--b--", 415, "unsupported-media-type"),
    ],
)
async def test_bad_bodies_are_problems(
    service: Service, kind: str, content: bytes, status: int, slug: str
) -> None:
    """A body of another kind, too large, or that is not JSON is a problem document."""
    headers = {"Content-Type": kind}
    problem(await service.client.post("/tasks", content=content, headers=headers), status, slug)


async def test_a_failed_task_tells_why_and_can_be_tried_again(service: Service) -> None:
    """A failure is the task's problem and /predict's 409; the same POST queues the task again."""
    location = (await service.client.post("/tasks", json=body("fail"))).headers["location"]
    task = await service.until_state(location, "failed")
    assert task["problem"]["type"] == "urn:vouchsafe:problem:adaptation-failed"
    assert task["problem"]["kind"] == "diverged"
    assert "lower steps" in task["problem"]["detail"]
    refused = problem(await service.ask(task=task["id"]), 409, "task-failed")
    assert (refused["task"], refused["problem"]) == (task["id"], task["problem"])
    again = await service.client.post("/tasks", json=body("fail"))
    assert (again.status_code, again.json()["state"]) == (202, "queued")


async def test_a_task_that_is_not_ready_says_when_to_come_back(service: Service) -> None:
    """/predict on a task in the making is a 503 with its state, its progress and Retry-After."""
    location = (await service.client.post("/tasks", json=body("wait"))).headers["location"]
    found = await service.until(location, lambda r: r.json()["stage"] == "finetuning")
    response = await service.ask(task=found.json()["id"])
    refused = problem(response, 503, "task-not-ready")
    assert response.headers["retry-after"] == "3"
    assert (refused["task"], refused["state"]) == (found.json()["id"], "running")
    assert (refused["stage"], refused["progress"]) == ("finetuning", 0.5)


async def test_a_queued_task_has_no_estimate(tmp_path: Path) -> None:
    """Before a job has begun Retry-After is ten seconds."""
    async with idle(tmp_path) as service:
        task = (await service.client.post("/tasks", json=body())).json()
        response = await service.ask(task=task["id"])
        assert problem(response, 503, "task-not-ready")["state"] == "queued"
        assert response.headers["retry-after"] == "10"


async def test_what_is_unknown_is_a_404(service: Service) -> None:
    """Tasks that never were are not found, whatever is asked of them."""
    for path in ("/tasks/unknown", "/tasks/default", "/tasks/unknown/events"):
        problem(await service.client.get(path), 404, "not-found")
    problem(await service.client.delete("/tasks/unknown"), 404, "not-found")
    assert "default" in problem(await service.ask(task="unknown"), 404, "not-found")["tasks"]


async def test_only_its_maker_deletes_a_task(tmp_path: Path) -> None:
    """Every key sees a task; another key than its maker's gets a 403, and so does the default."""
    async with idle(tmp_path, **KEYS) as service:
        problem(await service.client.post("/tasks", json=body()), 401, "unauthorized")
        accepted = await service.client.post("/tasks", json=body(), headers=ANN)
        location = accepted.headers["location"]
        assert (await service.client.get(location, headers=BOB)).json() == accepted.json()
        problem(await service.client.delete(location, headers=BOB), 403, "forbidden")
        problem(await service.client.delete("/tasks/default", headers=ANN), 403, "forbidden")
        assert (await service.client.delete(location, headers=ANN)).status_code == 204
        problem(await service.client.get(location, headers=ANN), 404, "not-found")


async def test_delete_while_it_runs(service: Service, tmp_path: Path) -> None:
    """Deleting a task in the making answers once its process is gone, and leaves nothing."""
    location = (await service.client.post("/tasks", json=body("hang"))).headers["location"]
    await service.until(location, lambda r: r.json()["stage"] == "finetuning")
    task_id = location.rpartition("/")[2]
    streaming = asyncio.create_task(service.client.get(f"{location}/events"))
    await asyncio.sleep(0.1)
    assert (await service.client.delete(location)).status_code == 204
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [".lock"]
    assert events((await streaming).text)[-1] == ("cancelled", {"id": task_id})
    problem(await service.ask(task=task_id), 404, "not-found")


async def test_a_deleted_task_is_asked_no_more(service: Service) -> None:
    """Deleting a ready task cancels the questions that wait for it, and answers no new ones."""
    location = await made(service)
    task_id = location.rpartition("/")[2]
    service.serve(task_id)
    service.voter.open.clear()
    waiting = asyncio.create_task(service.ask(task=task_id))
    await service.voter.busy.wait()
    assert (await service.client.delete(location)).status_code == 204
    problem(await service.ask(task=task_id), 404, "not-found")
    job = problem(await waiting, 409, "cancelled")["job"]
    assert (await service.client.get(f"/jobs/{job}")).json()["state"] == "cancelled"
    assert (await service.engine.capacity()).backlog_rows == 0


async def test_a_deleted_task_leaves_no_metrics(service: Service) -> None:
    """The series of a task go with it, so that their number is bounded by the tasks there are."""
    service.voter.votes = lambda rows: [rows // 2, rows - rows // 2]
    location = await made(service)
    task_id = location.rpartition("/")[2]
    service.serve(task_id)
    assert (await service.ask(task=task_id)).json()["abstained"]
    metrics.ROWS.labels(task=task_id).inc()
    await until(
        lambda: counted(
            "vouchsafe_predictions_total", task=task_id, mode="certify", outcome="abstained"
        )
    )
    assert task_id in (await service.client.get("/metrics")).text
    assert (await service.client.delete(location)).status_code == 204
    await service.until("/metrics", lambda found: task_id not in found.text)


async def test_one_odd_folder_hides_no_task(service: Service, tmp_path: Path) -> None:
    """A manifest with a field of another type is left out of the list that everyone gets."""
    location = await made(service)
    odd = tmp_path / "tasks" / "odd"
    odd.mkdir()
    described = json.loads((DEFAULT_TASK / "manifest.json").read_text())
    (odd / "manifest.json").write_text(json.dumps(described | {"figures": [1]}))
    listed = (await service.client.get("/tasks")).json()["tasks"]
    assert [f"/tasks/{task['id']}" for task in listed] == [location]


async def test_tasks_are_listed_in_pages(tmp_path: Path) -> None:
    """The newest tasks come first, so many at once; `next` leads to the rest, whatever comes."""
    async with idle(tmp_path) as service:
        posted = [(await service.client.post("/tasks", json=body(seed=i))).json() for i in range(5)]
        newest_first = [task["id"] for task in posted[::-1]]
        whole = (await service.client.get("/tasks")).json()
        assert ([task["id"] for task in whole["tasks"]], whole["next"]) == (newest_first, None)
        seen, address = [], "/tasks?limit=2"
        while address:
            page = (await service.client.get(address)).json()
            assert len(page["tasks"]) <= 2
            seen += [task["id"] for task in page["tasks"]]
            address = page["next"]
            await service.client.post("/tasks", json=body(seed=10 + len(seen)))
        assert seen == newest_first
        assert page["tasks"] == [whole["tasks"][-1]]


@pytest.mark.parametrize(
    ("asked", "field", "value", "limit"),
    [
        ({"limit": "0"}, "limit", "0", 1),
        ({"limit": "1001"}, "limit", "1001", 1000),
        ({"limit": "many"}, "limit", "many", None),
        ({"after": "unknown"}, "after", "unknown", None),
        ({"after": "x" * 5_000}, "after", "x" * 77 + "...", None),
    ],
)
async def test_pages_that_cannot_be_are_named(
    tmp_path: Path, asked: dict[str, str], field: str, value: str, limit: int | None
) -> None:
    """A page outside its limits, or after a task that is gone, is a 422 that names the field."""
    async with idle(tmp_path) as service:
        response = await service.client.get("/tasks", params=asked)
    (error,) = problem(response, 422, "invalid-field")["errors"]
    assert (error["field"], error.get("value"), error.get("limit")) == (field, value, limit)


async def test_limits_of_disk_and_queue(tmp_path: Path) -> None:
    """Too many jobs are a 503 with Retry-After, and a full quota is a 507 that names its limit."""
    async with idle(tmp_path / "a", max_pending_tasks=1) as service:
        await service.client.post("/tasks", json=body())
        response = await service.client.post("/tasks", json=body(seed=1))
        assert problem(response, 503, "backlog")["limit"] == 1
        assert response.headers["retry-after"] == "60"
    async with idle(tmp_path / "b", task_storage_bytes=1) as service:
        await service.client.post("/tasks", json=body())
        full = problem(await service.client.post("/tasks", json=body(seed=1)), 507, "storage-full")
        assert (full["limit"], full["largest"][0]["bytes"]) == (1, full["used"])


async def test_events_end_with_the_task(service: Service, tmp_path: Path) -> None:
    """The stream shows progress that never falls, and ends with the ready task itself."""
    location = (await service.client.post("/tasks", json=body("wait"))).headers["location"]
    await service.until(location, lambda r: r.json()["stage"] == "finetuning")
    streaming = asyncio.create_task(service.client.get(f"{location}/events"))
    await asyncio.sleep(0.1)
    (tmp_path / "jobs" / location.rpartition("/")[2] / GO).touch()
    response = await streaming
    assert response.headers["content-type"].startswith("text/event-stream")
    *progress, (last, task) = events(response.text)
    assert {name for name, _ in progress} == {"progress"}
    assert set(progress[0][1]) == {"state", "stage", "progress", "eta_seconds", "losses"}
    shown = [data["progress"] for _, data in progress]
    assert shown == sorted(shown)
    assert (last, task) == ("ready", (await service.client.get(location)).json())


async def test_events_of_a_failed_task_end_with_its_problem(service: Service) -> None:
    """The stream of a task that fails ends with the problem document."""
    location = (await service.client.post("/tasks", json=body("fail"))).headers["location"]
    name, document = events((await service.client.get(f"{location}/events")).text)[-1]
    assert (name, document["kind"]) == ("problem", "diverged")


async def test_a_damaged_bundle_is_not_served_and_can_be_made_anew(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bundle whose files do not match is refused by name, and the same POST makes it again."""
    good = (await made(service, seed=1)).rpartition("/")[2]
    location = await made(service)
    task_id = location.rpartition("/")[2]
    (tmp_path / "tasks" / task_id / "prompt_states.safetensors").write_bytes(b"damaged")
    await until(lambda: task_id not in service.catalog)
    assert "prompt_states.safetensors" in caplog.text
    task = (await service.client.get(location)).json()
    assert (task["state"], task["problem"]["kind"]) == ("failed", "incompatible")
    assert "prompt_states.safetensors" in task["problem"]["detail"]
    assert str(tmp_path) not in task["problem"]["detail"]
    problem(await service.ask(task=task_id), 409, "task-failed")
    assert good in service.catalog
    again = await service.client.post("/tasks", json=body())
    assert (again.status_code, again.json()["state"]) == (202, "queued")
    await service.until_state(location, "ready")
    assert task_id in service.catalog


async def test_what_another_process_does_is_seen(service: Service, tmp_path: Path) -> None:
    """Bundles that come and go by another process' hand are served and dropped by themselves."""
    store, plan = make_store(tmp_path), make_plan()
    (tmp_path / "elsewhere").mkdir()
    for name in ("copied", "misnamed", "bad name"):
        job = tmp_path / "elsewhere" / name.replace("mis", "")
        publish(job, store.tasks, plan)
        job.with_name(name)
    (store.tasks / "named").rename(store.tasks / "misnamed")
    (store.tasks / "link").symlink_to(DEFAULT_TASK)
    await until(lambda: "copied" in service.catalog)
    assert set(service.catalog) == {"default", "copied"}
    assert set(service.catalog.refused) == {"misnamed", "link"}
    store.delete("copied")
    await until(lambda: set(service.catalog) == {"default"})


async def test_tasks_are_described(service: Service) -> None:
    """OpenAPI has the request's fields and the problems of making a task."""
    paths = (await service.client.get("/openapi.json")).json()["paths"]
    assert {p["name"] for p in paths["/tasks"]["get"]["parameters"]} == {"limit", "after"}
    assert "application/problem+json" in paths["/tasks"]["get"]["responses"]["422"]["content"]
    operation = paths["/tasks"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert {"labels", "template", "allow_unknown_labels"} <= set(schema["properties"])
    for status in ("202", "401", "413", "415", "422", "503", "507"):
        assert status in operation["responses"]
    assert {"/tasks/{id}", "/tasks/{id}/events", "/tasks/{id}/references/{file}"} <= set(paths)


def test_a_server_killed_in_every_stage_goes_on_after_its_restart(tmp_path: Path) -> None:
    """kill -9 of the server ends the job's process; the next server finishes it and answers."""
    command = (sys.executable, "-m", "tests.support.fake_server")
    store = make_store(tmp_path)
    for stage in STAGES:
        task, location = _killed_in(stage, store, command)
    (store.tasks / ".trash-left").mkdir(parents=True)
    with serving_process(tmp_path, command) as (url, server):
        wait_until(lambda: httpx.get(url + location).json()["state"] == "ready")
        assert not (store.tasks / ".trash-left").exists()
        question = {"task": task["id"], "n": "100", "n0": "20"}
        answer = httpx.post(f"{url}/predict", files={"image": png(4)}, data=question, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["label"] in ("frog", "ship")
        assert sum(count["count"] for count in answer.json()["counts"]) == 100
        listed = {m["task"]: m["ready"] for m in httpx.get(f"{url}/models").json()["models"]}
        assert listed == {"default": True, task["id"]: True}
        httpx.post(f"{url}/tasks", json=body("hang"))
        wait_until(lambda: any(t.status.stage == "finetuning" for t in store.unfinished()))
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    (left,) = store.unfinished()
    assert left.status.state == "queued"
    assert not _is_running(starts(store, left)[0])


def _killed_in(stage: str, store: Store, command: Sequence[str]) -> tuple[dict[str, Any], str]:
    """A task, and its address, whose server was killed in one more stage than the one before."""
    labels, begun = ["frog", "ship"], STAGES.index(stage) + 1
    with serving_process(store.jobs.parent, command, "/livez") as (url, server):
        accepted = httpx.post(f"{url}/tasks", json=body("everywhere", labels=labels))
        task, location = accepted.json(), accepted.headers["location"]
        wait_until(lambda: len(starts(store, store.get(task["id"]))) == begun)
        wait_until(lambda: httpx.get(url + location).json()["stage"] == stage)
        assert httpx.get(url + location).json()["state"] == "running"
        server.kill()
        server.wait()
        wait_until(lambda: not _is_running(starts(store, store.get(task["id"]))[-1]))
    return task, location


def _is_running(process: int) -> bool:
    """Whether the process does anything; a zombie that nobody waits for does not."""
    try:
        described = json.dumps(Path(f"/proc/{process}/stat").read_text())
    except FileNotFoundError:
        return False
    os.kill(process, 0)
    return ") Z " not in described
