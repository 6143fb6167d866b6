"""Both clients: many pictures, tasks with their events, jobs, certificates."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import client
from service.client.events import Event, EventParser
from service.tasks.supervisor import Supervisor
from tests.support.adapting import FAKE, FAST, make_store
from tests.support.clients import BOTH
from tests.support.listening import listening
from tests.support.scripted import scripted
from tests.support.serving import PNG, Service

LABELS = ["cat", "dog"]
Made = Callable[..., Any]


@pytest.fixture(params=BOTH)
def made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.param
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, of which one is none, and a file of another kind."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in (("a.png", PNG), ("b.PNG", PNG), ("c.png", b"no"), ("d.txt", b"")):
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_is_answered(made: Made, pictures: Path, tmp_path: Path) -> None:
    """Each picture has its answer or its error, with its share of alpha, and a line in a file."""
    seen: list[client.Answer] = []
    with listening(Service(data_dir=tmp_path / "data")) as running, made(running.url) as asking:
        for out in ("answers.jsonl", "answers.csv"):
            asked = {"n": 200, "family_alpha": 0.01, "at_once": 2, "out": tmp_path / out}
            answers = list(asking.predict_many(pictures, on_answer=seen.append, **asked))
            assert sorted(Path(each.name).name for each in answers) == ["a.png", "b.PNG", "c.png"]
            by_name = {Path(each.name).name: each for each in answers}
            good, bad = by_name["a.png"], by_name["c.png"]
            assert good.answer is not None
            assert 0.0033 < good.answer["alpha"] <= 0.01 / 3
            assert (bad.answer, type(bad.error)) == (None, client.InvalidRequest)
        listed = [str(pictures / "a.png")]
        assert [each.name for each in asking.predict_many(listed, n=200)] == listed
        for wrong, reason in (
            ({"images": tmp_path}, "there is no picture"),
            ({"images": pictures, "alpha": 0.1, "family_alpha": 0.1}, "exclude each other"),
            ({"images": pictures, "out": "answers.txt"}, "must end in .jsonl or .csv"),
        ):
            with pytest.raises(ValueError, match=reason):
                list(asking.predict_many(wrong.pop("images"), **wrong))
    assert len(seen) == 6
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["name"]: line["error"] == "" for line in lines} == {
        str(pictures / "a.png"): True, str(pictures / "b.PNG"): True, str(pictures / "c.png"): False
    }  # fmt: skip
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = {Path(row["name"]).name: row for row in csv.DictReader(file)}
    assert (rows["a.png"]["label"], rows["a.png"]["certified"]) == ("cat", "True")
    assert "415" in rows["c.png"]["error"]


def test_a_task_is_made_waited_for_and_removed(made: Made, tmp_path: Path) -> None:
    """Progress comes as it is made; a failed task is a problem, and one removed a conflict."""
    supervisor = Supervisor(make_store(tmp_path), FAKE, FAST)
    service = Service(more=[supervisor.run], data_dir=tmp_path)
    with listening(service) as running, made(running.url) as asking:
        progress: list[dict[str, Any]] = []
        task = asking.make_task(LABELS, template="plain {}", shots=1, name="pets", seed=None)
        ready = asking.wait_for_task(task["id"], progress.append)
        assert (ready["state"], ready["name"]) == ("ready", "pets")
        assert all({"state", "progress"} <= set(each) for each in progress)
        assert asking.task("pets")["id"] == task["id"]
        assert [each["id"] for each in asking.tasks()] == [task["id"]]
        assert "pets" in [each["name"] for each in asking.models()]
        asking.delete_task(task["id"])
        with pytest.raises(client.NotFound):
            asking.task(task["id"])
        failing = asking.make_task(LABELS, template="fail {}", shots=1)
        with pytest.raises(client.ProblemError):
            asking.wait_for_task(failing["id"])
        with pytest.raises(client.InvalidRequest, match="shots"):
            asking.make_task(LABELS, shots=0)


def test_a_job_and_its_certificate_can_be_requested_again(made: Made, tmp_path: Path) -> None:
    """The job has the answer, its events end with it, and its certificate has a key."""
    with listening(Service(data_dir=tmp_path)) as running, made(running.url) as asking:
        answer = asking.predict(PNG, n=200)
        assert asking.job(answer["id"])["result"]["label"] == answer["label"]
        *_, last = asking.job_events(answer["id"])
        assert (last.kind, last.data["id"]) == ("result", answer["id"])
        document = answer["certificate"]["document"]
        assert asking.certificate(document["id"])["document"] == document
        assert asking.public_keys()["keys"]
        asking.delete_job(answer["id"])
        for call in (asking.job, lambda id: list(asking.job_events(id))):
            with pytest.raises(client.NotFound):
                call(answer["id"])
        with pytest.raises(client.NotFound):
            asking.job("a/b?c")


def test_a_busy_service_is_tried_again(made: Made) -> None:
    """As one job, for both clients; a stream that ends early is Unreachable."""
    busy = {"type": "urn:vouchsafe:problem:backlog", "status": 503, "detail": "later"}
    responses = [(503, {"Retry-After": "0"}, busy), (504, {}, {}), (200, {}, {"label": "cat"})]
    stream = 'event: progress\ndata: {"state":\ndata: "running"}\n\n'
    with scripted(*responses, (200, {}, stream)) as server, made(server.url) as asking:
        assert asking.predict(PNG) == {"label": "cat"}
        assert len({request["Idempotency-Key"] for request in server.requests}) == 1
        with pytest.raises(client.Unreachable, match="ended before it was ready"):
            asking.wait_for_task("t", lambda data: None)


def test_other_calls_are_tried_again_too(made: Made) -> None:
    """Where Retry-After says when; without it, and beyond the patience, they are Busy."""
    busy = {"status": 503, "detail": "later"}
    later, never, late = (
        (503, {"Retry-After": "0"}, busy),
        (503, {}, busy),
        (429, {"Retry-After": "9"}, busy),
    )
    found = (200, {}, {"tasks": [], "next": None})
    made_task = (202, {}, {"id": "t"})
    responses = (later, later, found, later, made_task, never, late)
    with scripted(*responses) as server, made(server.url, timeout=5.0) as asking:
        assert asking.tasks() == []
        assert asking.make_task(LABELS) == {"id": "t"}
        for _ in range(2):
            with pytest.raises(client.Busy):
                asking.models()
    assert len(server.requests) == len(responses)


def test_a_demonstration_is_waited_for(made: Made) -> None:
    """A 202 is asked for again under the same key, until the pictures are there."""
    busy = (503, {"Retry-After": "0"}, {"status": 503, "detail": "later"})
    waiting, done = (
        (202, {}, {"id": "d", "status": "running"}),
        (200, {}, {"id": "d", "status": "done"}),
    )
    with scripted(busy, waiting, done) as server, made(server.url) as asking:
        assert asking.demonstrate(PNG, kind="rows")["status"] == "done"
    assert len({request["Idempotency-Key"] for request in server.requests}) == 1


def test_events_are_parsed_line_by_line() -> None:
    """Comments and unknown fields are left out, and data of several lines is one document."""
    parser = EventParser()
    lines = [": ping", "", "id: 3", "event: bound", 'data: {"rows":', "data:1}", "", "data: {}", ""]
    found = [event for line in lines if (event := parser.feed(line)) is not None]
    assert found == [Event("bound", {"rows": 1}), Event("message", {})]
