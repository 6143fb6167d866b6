"""Labels and tasks' names, over HTTP and on the command line: refused, with prompts, asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models.adaptation.plan import MEASURED_ON
from models.bundle import read_bundle
from service.cli.main import app
from tests.support.adapting import FAKE, create, make_plan, make_store
from tests.support.fake_adaptation import FIGURES, publish
from tests.support.serving import Service, problem
from tests.support.task_service import adapting, body, idle, made

CAT = "\u732b"
PROMPTED = [{"label": CAT, "prompt": "cat"}, "dog"]


async def ask(service: Service, task: str, task_id: str) -> dict[str, Any]:
    """What /predict answers for a task of two labels, of which all rows show the first."""
    service.voter.votes = lambda rows: [rows, 0]
    service.serve(task_id)
    response = await service.ask(task=task)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


@pytest.mark.parametrize(
    ("label", "read"),
    [("A320", "plain ."), (CAT, "plain ."), ("Airbus A320", "plain airbus .")],
)
async def test_labels_that_are_not_read_are_refused(tmp_path: Path, label: str, read: str) -> None:
    """A 422 names the label and what its caption would be read as; nothing is made."""
    asked = body(labels=["cat", label], allow_unknown_labels=True, template="plain {}.")
    async with idle(tmp_path) as service:
        refused = await service.client.post("/tasks", json=asked)
    (error,) = problem(refused, 422, "invalid-field")["errors"]
    assert (error["field"], error["value"]) == ("labels.1", label)
    read_as = f'labels.1 is "{label}"; "plain {label}." would be read as "{read}"'
    assert read_as in error["detail"]
    assert not (tmp_path / "jobs").exists()


async def test_a_label_may_have_a_prompt(tmp_path: Path) -> None:
    """The prompt goes into the bundle; the task is named, listed and answered by its labels."""
    async with adapting(tmp_path) as service:
        accepted = (await service.client.post("/tasks", json=body(labels=PROMPTED))).json()
        assert (accepted["labels"], accepted["prompts"]) == ([CAT, "dog"], {CAT: "cat"})
        assert accepted["name"] == f"{CAT}, dog"
        task = await service.until_state(f"/tasks/{accepted['id']}", "ready")
        assert (task["labels"], task["prompts"]) == ([CAT, "dog"], {CAT: "cat"})
        assert read_bundle(tmp_path / "tasks" / task["id"]).words == ("cat", "dog")
        told = await ask(service, task["id"], task["id"])
        assert (told["label"], told["counts"]) == (CAT, [{"label": CAT, "count": 1000}])
        plain = (await service.client.post("/tasks", json=body(labels=["cat", "dog"]))).json()
        spelled = body(labels=[{"label": "cat", "prompt": "cat"}, "dog"])
        again = (await service.client.post("/tasks", json=spelled)).json()
    assert plain["prompts"] == {}
    assert plain["id"] == again["id"] != task["id"]


@pytest.mark.parametrize(
    ("given", "field", "reason"),
    [
        (3, "labels.1", "a string, or an object of two strings, label and prompt"),
        ({"label": "dog"}, "labels.1", "a string, or an object of two strings"),
        ({"label": "dog", "prompt": None}, "labels.1", "a string, or an object of two strings"),
        ({"label": "dog", "prompt": "dog", "x": 1}, "labels.1", "a string, or an object of two"),
        ({"label": "Hund", "prompt": "A320"}, "labels.1.prompt", '"A320"; "plain A320" would be'),
        ({"label": "Hund", "prompt": "cat"}, "labels.1.prompt", "would be read as labels.0"),
        ({"label": "Hund", "prompt": "wug"}, "labels.1.prompt", '"wug" is not a word that nano'),
        ({"label": "CAT", "prompt": "dog"}, "labels.1", 'labels.1 is the same as labels.0: "CAT"'),
    ],
)
async def test_bad_labels_and_prompts_are_named(
    tmp_path: Path, given: object, field: str, reason: str
) -> None:
    """Each is a 422 of its field, be it the label's or the prompt's."""
    async with idle(tmp_path) as service:
        response = await service.client.post("/tasks", json=body(labels=["cat", given]))
    (error,) = problem(response, 422, "invalid-field")["errors"]
    assert error["field"] == field
    assert reason in error["detail"]


async def test_a_task_is_asked_by_its_name(tmp_path: Path) -> None:
    """A name that one task has is as good as its id: to see it, to ask it, and to be told the same
    under one Idempotency-Key; answer and job carry the id."""
    async with adapting(tmp_path) as service:
        task_id = (await made(service, name="Caf\u00e9 pets")).rpartition("/")[2]
        for name in ("Caf\u00e9 pets", "Cafe\u0301 pets"):
            assert (await service.client.get(f"/tasks/{name}")).json()["id"] == task_id
            assert (await ask(service, name, task_id))["task"] == task_id
        key = {"Idempotency-Key": "one"}
        by_name = await service.ask(task="Caf\u00e9 pets", headers=key)
        by_id = await service.ask(task=task_id, headers=key)
        assert by_name.json() == by_id.json()
        for unknown in ("Pets", "cat, dog"):
            problem(await service.ask(task=unknown), 404, "not-found")
            problem(await service.client.get(f"/tasks/{unknown}"), 404, "not-found")


async def test_a_name_that_several_tasks_have_is_refused(tmp_path: Path) -> None:
    """A 409 lists their ids; a task that is ready is asked before one that is not, and an id is an
    id whatever others are called."""
    async with adapting(tmp_path) as service:
        first = (await made(service, name="pets")).rpartition("/")[2]
        waiting = (await service.client.post("/tasks", json=body("wait", name="pets"))).json()["id"]
        assert (await ask(service, "pets", first))["task"] == first
        for copy, name in (("second", "pets"), ("third", first), ("fourth", waiting)):
            publish(tmp_path / copy, tmp_path / "tasks", make_plan(), name)
        await service.catalog.refresh()
        for response in (
            await service.ask(task="pets"),
            await service.client.get("/tasks/pets"),
        ):
            refused = problem(response, 409, "task-ambiguous")
            assert sorted(refused["tasks"]) == sorted([first, "second"])
            assert first in refused["detail"]
        assert (await ask(service, first, first))["task"] == first
        assert problem(await service.ask(task=waiting), 503, "task-not-ready")["task"] == waiting


async def test_the_name_of_a_task_in_the_making_is_not_ready(tmp_path: Path) -> None:
    """It is the same 503 as its id's, until another such task is asked for."""
    async with idle(tmp_path) as service:
        task = (await service.client.post("/tasks", json=body(name="pets"))).json()
        by_name, by_id = [await service.ask(task=asked) for asked in ("pets", task["id"])]
        assert problem(by_name, 503, "task-not-ready") == problem(by_id, 503, "task-not-ready")
        assert by_name.headers["retry-after"] == by_id.headers["retry-after"] == "10"
        assert (await service.client.get("/tasks/pets")).json()["id"] == task["id"]
        await service.client.post("/tasks", json=body(name="pets", seed=1))
        problem(await service.ask(task="pets"), 409, "task-ambiguous")


def test_figures_say_what_they_were_measured_on(tmp_path: Path) -> None:
    """So do those of a bundle and of a job that an earlier release left; what was not adapted was
    not measured on references of its own."""
    store = make_store(tmp_path)
    task = create(store)
    assert store.get(task.id).status.figures == {}
    publish(store.jobs / task.id, store.tasks, make_plan())
    publish(tmp_path / "copied", store.tasks, make_plan())
    manifest = store.tasks / "copied" / "manifest.json"
    assert "measured_on" not in manifest.read_text()
    for task_id in (task.id, "copied"):
        figures = store.get(task_id).status.figures
        assert figures == {"measured_on": MEASURED_ON, **FIGURES}
    described = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(described | {"adaptation": {}}))
    assert store.get("copied").status.figures == FIGURES


def test_the_command_line_takes_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the labels file a tab stands between a label and its prompt; what is printed says what the
    figures were measured on; a label that is not read is refused with 2."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("service.tasks.process.JOB", FAKE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text(f"{CAT}\tcat\ndog \t\n\n")
    command = ["adapt", "--labels", "labels.txt", "--template", "plain {}", "--shots", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f'"measured_on": "{MEASURED_ON}"' in result.stdout
    (task,) = json.loads(CliRunner().invoke(app, ["models", "list", "--json"]).stdout)[1:]
    assert (task["labels"], task["prompts"]) == ([CAT, "dog"], {CAT: "cat"})
    shown = CliRunner().invoke(app, ["models", "show", task["id"], "--json"])
    assert json.loads(shown.stdout)["figures"] == {"measured_on": MEASURED_ON, **FIGURES}
    (tmp_path / "labels.txt").write_text("cat\nA320\n")
    refused = CliRunner().invoke(app, [*command, "--allow-unknown-labels"])
    assert refused.exit_code == 2
    assert 'labels.1 is "A320"' in refused.stderr
