from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from models.adaptation.plan import PLAN, REFERENCES, STATUS, Status, locked, write_json
from models.bundle import DEFAULT_TASK, read_bundle
from service.config import Settings
from service.errors import Backlog, NotFound, StorageFull
from service.tasks.repository import SPARED_SECONDS, TaskRepository
from service.tasks.store import retry_after
from service.tasks.task import signature
from tests.support.adapting import create, make_plan, make_store
from tests.support.fake_adaptation import pictures, publish
from tests.support.serving import SECRET


def test_a_task_is_created_once(tmp_path: Path) -> None:
    """The same plan is the same queued task, whoever asks and whatever they call it."""
    store = make_store(tmp_path)
    first = create(store, owner="ann")
    again = store.create(make_plan(), "another name", "bob")
    assert again == first
    assert first.id == make_plan().identity(SECRET)
    assert (first.status.state, first.owner, first.name) == ("queued", "ann", "a plain task")
    assert [task.id for task in store.all()] == [task.id for task in store.unfinished()]
    assert create(store, seed=1).id != first.id
    assert [task.settings["seed"] for task in store.all()] == [0, 1]


def test_an_empty_data_directory_has_no_tasks(tmp_path: Path) -> None:
    """Nothing is made on disk by looking."""
    store = make_store(tmp_path / "none")
    assert (store.all(), store.usage(), store.find("a" * 32)) == ([], {}, None)
    assert not (tmp_path / "none").exists()


def test_what_is_published_is_ready(tmp_path: Path) -> None:
    """A published bundle makes its task ready, though its job's process never said so."""
    store = make_store(tmp_path)
    task = create(store)
    Status("running", stage="evaluating", progress=0.9).write(store.jobs / task.id)
    publish(store.jobs / task.id, store.tasks, make_plan())
    ready = store.get(task.id)
    assert (ready.status.state, ready.status.stage, ready.status.progress) == ("ready", None, 1.0)
    assert store.create(make_plan(), "x", None).status.state == "ready"
    assert store.unfinished() == []


def test_what_is_published_during_a_look_has_its_last_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that is published just after its status was read tells what came in between, too."""
    store = make_store(tmp_path)
    task = create(store)
    job, earlier = store.jobs / task.id, Status("running", stage="evaluating", losses={"a": 0.5})
    last = earlier.changed(losses={"a": 0.5, "evaluating": 0.25})
    last.write(job)
    publish(job, store.tasks, make_plan())
    looks = iter([earlier, last])
    monkeypatch.setattr(Status, "read", lambda folder: next(looks))
    assert store.get(task.id).status.losses == last.losses


def test_open_jobs_are_those_still_to_be_made(tmp_path: Path) -> None:
    """Queued and running jobs are counted; what is published, over or cannot be read is not."""
    store = make_store(tmp_path)
    assert store.open_jobs() == 0
    tasks = [create(store, seed=seed) for seed in range(5)]
    publish(store.jobs / tasks[0].id, store.tasks, make_plan())
    Status("running", progress=0.1).write(store.jobs / tasks[1].id)
    Status("failed", finished=1.0).write(store.jobs / tasks[2].id)
    (store.jobs / tasks[3].id / STATUS).write_text("no status")
    assert store.open_jobs() == 2
    create(store, seed=2)
    assert store.open_jobs() == 3


def test_a_bundle_without_a_job_is_a_task(tmp_path: Path) -> None:
    """A bundle copied into the folder is a ready task, told from its manifest."""
    store = make_store(tmp_path)
    folder = tmp_path / "tasks" / "copied"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes((DEFAULT_TASK / "manifest.json").read_bytes())
    (task,) = store.all()
    assert (task.id, task.owner, task.status.state) == ("copied", None, "ready")
    assert len(task.labels) == 10
    (folder / "manifest.json").write_text("{}")
    assert store.all() == []


def test_a_failed_task_is_queued_again(tmp_path: Path) -> None:
    """Asking once more for what failed queues it, with its folder and checkpoints as they were."""
    store = make_store(tmp_path)
    task = create(store)
    (store.jobs / task.id / "checkpoint").write_text("half")
    problem = {"kind": "diverged", "detail": "NaN"}
    Status("failed", losses={"personalizing": 2.0}, problem=problem).write(store.jobs / task.id)
    assert store.unfinished() == []
    again = create(store)
    assert (again.status.state, again.status.problem) == ("queued", None)
    assert again.status.losses == {"personalizing": 2.0}
    assert (store.jobs / task.id / "checkpoint").read_text() == "half"


def test_a_task_whose_bundle_was_taken_away_is_made_anew(tmp_path: Path) -> None:
    """Ready on paper without a bundle is cancelled, and asking again queues it; a bundle that is
    not the one which was seen to be damaged stays where it is."""
    store = make_store(tmp_path)
    task = create(store)
    publish(store.jobs / task.id, store.tasks, make_plan())
    Status("ready", progress=1.0).write(store.jobs / task.id)
    seen = signature(store.tasks / task.id)
    store.withdraw(task.id, seen[1:])
    assert store.get(task.id).status.state == "ready"
    store.withdraw(task.id, seen)
    assert store.get(task.id).status.state == "cancelled"
    assert create(store).status.state == "queued"


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    """Bundle and job are gone after a removal, and a second one finds nothing."""
    store = make_store(tmp_path)
    task = create(store)
    publish(store.jobs / task.id, store.tasks, make_plan())
    for left in (".partial-", ".withdrawn-"):
        (store.tasks / f"{left}{task.id}-x" / "inner").mkdir(parents=True)
    store.delete(task.id)
    assert store.find(task.id) is None
    assert [path.name for path in store.tasks.iterdir()] == [".lock"]
    assert [path.name for path in store.jobs.iterdir()] == [".lock"]
    for missing in (task.id, "default", "../tasks", "", ".lock"):
        with pytest.raises(NotFound):
            store.delete(missing)


def test_delete_waits_for_the_process_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is out of sight at once, and goes for good when its process has let go, or late."""
    monkeypatch.setattr("service.tasks.repository.CHILD_SECONDS", 0.2)
    store = make_store(tmp_path)
    task = create(store)
    seen: list[bool] = []

    def look(seconds: float) -> None:
        seen.append((store.jobs / task.id).exists())

    monkeypatch.setattr("service.tasks.repository.time.sleep", look)
    with locked(store.jobs / task.id):
        store.delete(task.id)
    assert seen
    assert not any(seen)
    assert store.find(task.id) is None


def test_too_many_jobs_are_refused(tmp_path: Path) -> None:
    """Past the most unfinished jobs a new task is a 503 that says when to come back."""
    store = make_store(tmp_path, max_pending_tasks=2)
    first = create(store)
    create(store, seed=1)
    with pytest.raises(Backlog, match="at most 2") as refused:
        create(store, seed=2)
    assert refused.value.retry_after == 60
    Status("running", eta_seconds=7.2).write(store.jobs / first.id)
    with pytest.raises(Backlog) as refused:
        create(store, seed=2)
    assert refused.value.retry_after == 8
    assert create(store).id == first.id
    store.delete(first.id)
    assert create(store, seed=2).status.state == "queued"


def test_no_key_fills_the_queue(tmp_path: Path) -> None:
    """A caller with a key may have half of the unfinished jobs; others and those without go on."""
    store = make_store(tmp_path, max_pending_tasks=5)
    own = [create(store, owner="ann", seed=seed) for seed in range(2)]
    with pytest.raises(Backlog, match=r"2 tasks of this key .* at most 2") as refused:
        create(store, owner="ann", seed=2)
    assert (refused.value.retry_after, refused.value.extra["limit"]) == (60, 2)
    assert create(store, owner="ann").id == own[0].id
    create(store, owner="bob", seed=3)
    create(store, seed=4)
    store.delete(own[0].id)
    assert create(store, owner="ann", seed=2).status.state == "queued"
    alone = make_store(tmp_path / "alone", max_pending_tasks=1)
    assert create(alone, owner="ann").status.state == "queued"


def test_the_disk_quota_names_what_to_delete(tmp_path: Path) -> None:
    """Past the quota a new task is a 507 with the bytes used, the limit and the largest tasks."""
    store = make_store(tmp_path, task_storage_bytes=100_000)
    task = create(store)
    (store.jobs / task.id / "checkpoint").write_bytes(bytes(100_000))
    with pytest.raises(StorageFull) as refused:
        create(store, seed=1)
    told = refused.value.document()
    assert (told["status"], told["limit"]) == (507, 100_000)
    assert told["used"] == sum(store.usage().values()) > 100_000
    assert told["largest"][0]["task"] == task.id
    assert task.id in told["detail"]
    assert create(store).id == task.id
    store.delete(task.id)
    assert create(store, seed=1).status.state == "queued"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room is the same problem as a full quota, and leaves nothing half-made."""
    store = make_store(tmp_path)

    def full(path: Path, document: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("service.tasks.store.write_json", full)
    with pytest.raises(StorageFull):
        create(store)
    assert [path.name for path in store.jobs.iterdir()] == [".lock"]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    """What killed processes left goes; the rest stays."""
    store = make_store(tmp_path)
    task = create(store)
    for folder in (store.tasks, store.jobs):
        for name in (".trash-x", ".partial-x"):
            (folder / name / "inner").mkdir(parents=True)
    store.sweep()
    assert [path.name for path in store.tasks.iterdir()] == [".lock"]
    assert {path.name for path in store.jobs.iterdir()} == {".lock", task.id}


def test_a_bundle_being_written_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes it, with a job here or without: a sweep at any moment lets it be."""
    store = make_store(tmp_path)
    copied, swept = shutil.copyfile, []

    def sweeping(source: Path, target: Path) -> None:
        copied(source, target)
        store.sweep()
        swept.append(target)

    monkeypatch.setattr("models.bundle.shutil.copyfile", sweeping)
    publish(tmp_path / "elsewhere" / "copied", store.tasks, make_plan())
    assert len(swept) == 1
    assert read_bundle(store.tasks / "copied").id == "copied"


def test_an_unreadable_job_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job of a later release, or a broken one, hides no other task and is named in the log."""
    store = make_store(tmp_path)
    good, bad = create(store), create(store, seed=1)
    document = json.loads((store.jobs / bad.id / PLAN).read_text())
    document["plan"]["of_a_later_release"] = 1
    (store.jobs / bad.id / PLAN).write_text(json.dumps(document))
    assert [task.id for task in store.all()] == [good.id]
    assert bad.id in caplog.text
    store.delete(bad.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3), ("labels", [1, 2]), ("labels", "cat"), ("template", None), ("figures", [1]),
        ("figures", {"clean": float("nan")}), ("adaptation", {"seed": float("inf")}),
        ("name", "\ud800"),
    ],
)  # fmt: skip
def test_an_odd_bundle_is_passed_over(tmp_path: Path, field: str, value: object) -> None:
    """A manifest with a field of another type, or that no answer can hold, hides no other task."""
    store, described = (
        make_store(tmp_path),
        json.loads((DEFAULT_TASK / "manifest.json").read_text()),
    )
    for name, changes in (("good", {}), ("odd", {field: value})):
        (store.tasks / name).mkdir(parents=True)
        (store.tasks / name / "manifest.json").write_text(json.dumps({**described, **changes}))
    (store.tasks / "deep").mkdir()
    (store.tasks / "deep" / "manifest.json").write_text("[" * 200_000 + "]" * 200_000)
    assert [task.id for task in store.all()] == ["good"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("name", "3"), ("owner", "[]"), ("created", '"now"'), ("created", "1e999"),
        ("plan", '{"labels": []}'),
    ],
)  # fmt: skip
def test_an_odd_plan_is_passed_over(tmp_path: Path, name: str, text: str) -> None:
    """A job whose document holds a field of another type hides no other task."""
    store = make_store(tmp_path)
    good, bad = create(store), create(store, seed=1)
    document = json.loads((store.jobs / bad.id / PLAN).read_text())
    document[name] = "here"
    (store.jobs / bad.id / PLAN).write_text(json.dumps(document).replace('"here"', text))
    assert [task.id for task in store.all()] == [good.id]


@pytest.mark.parametrize("odd", [{"figures": [1]}, {"state": "dreaming"}, {"progress": "half"}])
def test_an_odd_status_is_passed_over(tmp_path: Path, odd: dict[str, Any]) -> None:
    """A status that could not be told hides no other task."""
    store = make_store(tmp_path)
    good, bad = create(store), create(store, seed=1)
    (store.jobs / bad.id / STATUS).write_text(json.dumps(odd))
    assert [task.id for task in store.all()] == [good.id]


def test_a_damaged_manifest_leaves_its_job_a_task(tmp_path: Path) -> None:
    """A published job stays a task that can be posted again, whatever its manifest holds."""
    store = make_store(tmp_path)
    task = create(store)
    publish(store.jobs / task.id, store.tasks, make_plan())
    for text in ('{"figures": [1]}', "[" * 200_000, "[]", "{}", "9" * 5_000):
        (store.tasks / task.id / "manifest.json").write_text(text)
        assert store.get(task.id).status.figures == {}


def test_references_show_every_label_first(tmp_path: Path) -> None:
    """At most 20 pictures are named, the first shot of each label before any second."""
    store = make_store(tmp_path)
    task = create(store, labels=("cat", "dog", "ship"), shots=9)
    assert store.references(task) == []
    folder = store.jobs / task.id / REFERENCES
    pictures(folder, make_plan(labels=("cat", "dog", "ship"), shots=9))
    (folder / "0-0.json").write_text("{}")
    names = store.references(task)
    assert (len(names), names[:4]) == (20, ["0-0.png", "1-0.png", "2-0.png", "0-1.png"])
    assert store.reference(task.id, "2-8.png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name", ["../plan.json", "0-0.json", "0-0.png/", "9-9.png", "-1-0.png", "link-0.png", "0-9.png"]
)
def test_only_pictures_are_given_away(tmp_path: Path, name: str) -> None:
    """No name but a picture's own is read, and no link is followed."""
    store = make_store(tmp_path)
    task = create(store)
    pictures(store.jobs / task.id / REFERENCES, make_plan())
    (store.jobs / task.id / REFERENCES / "0-9.png").symlink_to(store.jobs / task.id / PLAN)
    with pytest.raises(NotFound):
        store.reference(task.id, name)
    with pytest.raises(NotFound):
        store.reference("..", "0-0.png")


def test_processes_that_create_together_agree(tmp_path: Path) -> None:
    """Of processes that ask for one task at the same time one makes it, and all get it."""
    code = (
        "import sys, pathlib; from tests.support.adapting import create, make_store;"
        "sys.stdin.read();"
        "print(create(make_store(pathlib.Path(sys.argv[1]), max_pending_tasks=1)).created)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]  # noqa: S603
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    told = set()
    for process in processes:
        assert process.stdout is not None
        told.add(process.stdout.read().strip())
        process.stdout.close()
        assert process.wait() == 0
    assert len(told) == 1


@pytest.mark.parametrize(("eta", "seconds"), [(None, 10), (0.0, 1), (59.5, 60), (1e6, 600)])
def test_retry_after_is_bounded(eta: float | None, seconds: int) -> None:
    """Retry-After is the estimate in whole seconds, 1 to 600, or the default."""
    assert retry_after(eta, 10) == seconds


def test_half_made_folders_of_a_fleet_are_let_be(tmp_path: Path) -> None:
    """Where another machine may be writing unseen, only what nobody wrote to for long is swept."""
    store = make_store(tmp_path, redis_url="redis://nowhere")
    task = create(store)
    for folder in (store.tasks, store.jobs):
        for name in (".partial-new", ".partial-old", ".partial-busy"):
            (folder / name).mkdir(parents=True)
            (folder / name / "weights").touch()
        hour_ago = time.time() - SPARED_SECONDS - 1
        for old in (".partial-old/weights", ".partial-old", ".partial-busy"):
            os.utime(folder / old, (hour_ago, hour_ago))
    store.sweep()
    left = {".lock", ".partial-new", ".partial-busy"}
    assert {path.name for path in store.tasks.iterdir()} == left
    assert {path.name for path in store.jobs.iterdir()} == {*left, task.id}


def test_machines_that_make_one_task_without_seeing_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that find no task and make it at the same time one makes it, and both get it."""
    store, other = make_store(tmp_path), make_store(tmp_path)
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    write, made = write_json, []

    def meanwhile(path: Path, document: object) -> None:
        if not made:
            made.append(None)
            made.append(create(other))
        write(path, document)

    monkeypatch.setattr("service.tasks.store.write_json", meanwhile)
    assert create(store) == made[1]
    assert {path.name for path in store.jobs.iterdir()} == {".lock", made[1].id}


def test_only_what_came_too_late_is_cleared(tmp_path: Path) -> None:
    """A bundle of a job that is there stays; one whose job was removed goes, half made or whole."""
    store = make_store(tmp_path)
    task = create(store)
    publish(store.jobs / task.id, store.tasks, make_plan())
    store.clear(task.id)
    assert store.get(task.id).status.state == "ready"
    shutil.rmtree(store.jobs / task.id)
    (store.tasks / f".partial-{task.id}-x").mkdir()
    store.clear(task.id)
    assert [path.name for path in store.tasks.iterdir()] == [".lock"]


def test_folders_are_read_without_the_secret(tmp_path: Path) -> None:
    """Who makes no tasks needs no secret to find and remove them."""
    task = create(make_store(tmp_path))
    folders = TaskRepository(Settings(data_dir=tmp_path))
    assert folders.all() == [task]
    folders.delete(task.id)
    assert folders.all() == []
    assert not (tmp_path / "noise.secret").exists()


def test_the_data_directory_is_the_owners_alone(tmp_path: Path) -> None:
    """Whoever makes it first, tasks included: the noise secret will lie in it."""
    store = make_store(tmp_path / "data")
    store.sweep()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
