from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from models import files
from models.bundle import DEFAULT_TASK, Base, Bundle, read_bundle
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.jobs import JobStatus, State
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from service.processes.embedded import UNSERVED_SECONDS
from service.tasks import catalog as catalogs
from service.tasks.catalog import POLL_SECONDS, Catalog
from service.tasks.schemas import TaskRequest
from service.tasks.service import TaskService
from service.tasks.task import Signature, Task, signature
from tests.support.adapting import make_store
from tests.support.fakes import EngineSpy
from tests.support.serving import KEYS, NUMERICS, SECRET, TASKS, png, problem
from tests.support.task_bundles import put
from tests.support.task_service import adapting, body, made


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    "manifest",
    [
        '{"schema": ' + "9" * 5_000 + "}",
        nested(200_000),
        "[1]",
        '{"schema": 2}',
        json.dumps({**read_bundle(DEFAULT_TASK).manifest, "id": "odd", "k": 1}).replace(
            '"k": 1', '"k": 1e999'
        ),
    ],
    ids=["digits", "nesting", "a list", "empty", "infinite"],
)
async def test_an_odd_manifest_refuses_its_own_bundle_alone(tmp_path: Path, manifest: str) -> None:
    """Whatever a manifest holds, its bundle is refused by name and every other one is served."""
    put(tmp_path, "good")
    (put(tmp_path, "odd") / "manifest.json").write_text(manifest)
    catalog = Catalog(TASKS, tmp_path)
    await catalog.refresh()
    assert set(catalog) == {"default", "good"}
    assert set(catalog.refused) == {"odd"}
    assert catalog.refused["odd"].replaceable


async def test_any_error_refuses_one_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw while one bundle is read stops the reading of no other."""
    put(tmp_path, "good")
    put(tmp_path, "odd")
    read = catalogs.read_bundle

    def troubled(folder: Path) -> Bundle:
        if folder.name == "odd":
            raise RecursionError("too deep")
        return read(folder)

    monkeypatch.setattr(catalogs, "read_bundle", troubled)
    catalog = Catalog(TASKS, tmp_path)
    await catalog.refresh()
    assert set(catalog) == {"default", "good"}
    assert catalog.refused["odd"].reason == "too deep"


def changed_base(tmp_path: Path) -> tuple[Path, Base]:
    """A base network's folder, and what a bundle says of it."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"as they were")
    return folder, Base.of("super-resolution", str(folder), ["*"])


async def test_bases_are_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bundles on the same base networks the first has them hashed, until a file changes: none
    of them is served from then on, nor any that comes, until the file is as it was."""
    folder, base = changed_base(tmp_path)
    hashed: list[Path] = []
    sha256_of = files.sha256_of

    def counting(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(files, "sha256_of", counting)
    catalog = Catalog(TASKS, tmp_path / "tasks", tmp_path)
    for name in ("a", "b"):
        put(tmp_path / "tasks", name, denoiser=asdict(base))
    await catalog.refresh()
    assert set(catalog) == {"default", "a", "b"}
    assert hashed.count(folder / "weights.safetensors") == 1
    (folder / "weights.safetensors").write_bytes(b"of another release")
    put(tmp_path / "tasks", "c", classifier=asdict(replace(base, kind="timm")))
    await catalog.refresh()
    assert set(catalog.refused) == {"a", "b", "c"}
    assert set(catalog) == {"default"}
    assert "weights.safetensors" in catalog.refused["a"].reason
    assert hashed.count(folder / "weights.safetensors") == 2
    (folder / "weights.safetensors").write_bytes(b"as they were")
    await catalog.refresh()
    await catalog.refresh()
    assert (set(catalog), catalog.refused) == ({"default", "a", "b", "c"}, {})
    assert hashed.count(folder / "weights.safetensors") == 3


async def test_a_task_whose_base_cannot_be_looked_at_stays_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Passing trouble with the disk below a task that is served takes it from nobody."""
    folder, base = changed_base(tmp_path)
    put(tmp_path / "tasks", "a", denoiser=asdict(base))
    catalog = Catalog(TASKS, tmp_path / "tasks", tmp_path)
    await catalog.refresh()
    served = catalog["a"]

    def troubled(path: Path) -> Signature:
        if path == folder:
            raise OSError(5, "Input/output error")
        return signature(path)

    monkeypatch.setattr(catalogs, "signature", troubled)
    await catalog.refresh()
    assert catalog["a"] is served
    assert "not served" not in caplog.text


async def test_a_task_whose_base_has_changed_is_made_anew(tmp_path: Path) -> None:
    """Networks that change under a running server fail the tasks made on them; a POST remakes."""
    folder, base = changed_base(tmp_path)
    async with adapting(tmp_path / "data", models_dir=tmp_path) as service:
        location = await made(service)
        task_id = location.rpartition("/")[2]
        manifest = tmp_path / "data" / "tasks" / task_id / "manifest.json"
        described = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(described | {"denoiser": asdict(base)}))
        await service.catalog.refresh()
        assert task_id in service.catalog
        (folder / "weights.safetensors").write_bytes(b"of another release")
        await service.catalog.refresh()
        task = (await service.client.get(location)).json()
        assert (task["state"], task["problem"]["kind"]) == ("failed", "incompatible")
        assert "Post the same task" in task["problem"]["detail"]
        assert (
            "weights.safetensors"
            in problem(await service.ask(task=task_id), 409, "task-failed")["detail"]
        )
        again = await service.client.post("/tasks", json=body())
        assert again.json()["state"] == "queued"
        await service.until_state(location, "ready")
        assert task_id in service.catalog
    tasks = tmp_path / "data" / "tasks"
    assert {path.name for path in tasks.iterdir()} == {task_id, ".lock"}


async def test_an_added_task_of_a_missing_package_says_what_to_do(tmp_path: Path) -> None:
    """A kind that no installed package has; a POST could not make the task again."""
    async with adapting(tmp_path) as service:
        task_id = (await made(service)).rpartition("/")[2]
        described = json.loads((tmp_path / "tasks" / task_id / "manifest.json").read_text())
        blur = described["denoiser"] | {"kind": "blur"}
        added = described | {"id": "added", "adaptation": {}, "denoiser": blur}
        shutil.copytree(tmp_path / "tasks" / task_id, tmp_path / "added")
        (tmp_path / "added" / "manifest.json").write_text(json.dumps(added))
        (tmp_path / "added").rename(tmp_path / "tasks" / "added")
        detail = (await service.client.get("/tasks/added")).json()["problem"]["detail"]
        assert "a package that adds it must be installed here" in detail
        assert "`vouchsafe models remove` and `add` make it again" in detail


async def test_a_later_releases_bundle_is_let_be(tmp_path: Path) -> None:
    """A schema that this release does not know is the task's problem; a POST changes nothing."""
    async with adapting(tmp_path) as service:
        location = await made(service)
        manifest = tmp_path / "tasks" / location.rpartition("/")[2] / "manifest.json"
        described = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(described | {"schema": 99}))
        await service.catalog.refresh()
        told = (await service.client.post("/tasks", json=body())).json()
        assert told["state"] == "failed"
        assert "schema version 99" in told["problem"]["detail"]
        assert "delete it" in told["problem"]["detail"]
        assert json.loads(manifest.read_text())["schema"] == 99
        assert (await service.client.delete(location)).status_code == 204


@pytest.mark.parametrize("wrapped", [False, True])
async def test_passing_trouble_is_held_against_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """Too many open files refuse nothing: the bundle stays, and is read at the next look."""
    async with adapting(tmp_path) as service:
        location = await made(service)
        task_id = location.rpartition("/")[2]
        manifest = tmp_path / "tasks" / task_id / "manifest.json"
        read = catalogs.read_bundle

        def troubled(folder: Path) -> Bundle:
            error = OSError(24, "Too many open files")
            if wrapped:
                raise files.BundleError("cannot be read") from error
            raise error

        monkeypatch.setattr(catalogs, "read_bundle", troubled)
        os.utime(manifest)
        await service.catalog.refresh()
        assert task_id not in service.catalog
        assert service.catalog.refused == {}
        response = await service.ask(task=task_id)
        assert "cannot be read now" in problem(response, 503, "task-not-ready")["detail"]
        inode = manifest.stat().st_ino
        assert (await service.client.post("/tasks", json=body())).status_code == 200
        assert manifest.stat().st_ino == inode
        monkeypatch.setattr(catalogs, "read_bundle", read)
        await service.catalog.refresh()
        assert task_id in service.catalog


async def test_a_folder_that_cannot_be_looked_at_stays_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that fails takes no bundle away that was served before."""
    put(tmp_path, "good")
    catalog = Catalog(TASKS, tmp_path)
    await catalog.refresh()
    served = catalog["good"]

    def troubled(folder: Path) -> Signature:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(catalogs, "signature", troubled)
    await catalog.refresh()
    assert catalog["good"] is served


async def test_the_old_bundle_stays_until_the_new_is_there(tmp_path: Path) -> None:
    """What was posted again lies aside until its job has published another bundle."""
    store = make_store(tmp_path)
    catalog = Catalog(TASKS, store.tasks)
    desk = TaskService(store, catalog)
    asked = TaskRequest(labels=["cat", "dog"])
    task_id = asked.plan().identity(SECRET)
    damaged = put(store.tasks, task_id)
    (damaged / "prompt_states.safetensors").write_bytes(b"damaged")
    assert (await desk.create(asked, None)).state == "queued"
    (aside,) = store.tasks.glob(".withdrawn-*")
    assert aside.name.startswith(f".withdrawn-{task_id}-")
    store.sweep()
    assert aside.exists()
    put(store.tasks, task_id)
    store.sweep()
    assert {path.name for path in store.tasks.iterdir()} == {task_id, ".lock"}


async def test_of_two_posts_the_slower_one_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who posts a damaged task while another has it made anew leaves the new bundle in place."""
    store = make_store(tmp_path)
    desk = TaskService(store, Catalog(TASKS, store.tasks))
    asked = TaskRequest(labels=["cat", "dog"])
    task_id = asked.plan().identity(SECRET)
    (put(store.tasks, task_id) / "prompt_states.safetensors").write_bytes(b"damaged")
    withdraw, loop, made_anew = store.withdraw, asyncio.get_running_loop(), []

    def late(task: str, seen: Signature) -> None:
        if not made_anew:
            made_anew.append(True)
            asyncio.run_coroutine_threadsafe(desk.create(asked, None), loop).result(10)
            put(store.tasks, task_id)
        withdraw(task, seen)

    monkeypatch.setattr(store, "withdraw", late)
    assert (await desk.create(asked, None)).state == "ready"
    assert (store.tasks / task_id).is_dir()


async def test_of_two_posts_none_calls_ready_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who finds a damaged task just before another puts it aside is told that it is being made."""
    store = make_store(tmp_path)
    desk = TaskService(store, Catalog(TASKS, store.tasks))
    asked = TaskRequest(labels=["cat", "dog"])
    (put(store.tasks, asked.plan().identity(SECRET)) / "prompt_states.safetensors").write_bytes(b"")
    create, loop, found = store.create, asyncio.get_running_loop(), []

    def early(*arguments: Any) -> Task:
        task = create(*arguments)
        if not found:
            found.append(task)
            asyncio.run_coroutine_threadsafe(desk.create(asked, None), loop).result(10)
        return task

    monkeypatch.setattr(store, "create", early)
    assert (await desk.create(asked, None)).state == "queued"
    assert found[0].status.state == "ready"


async def test_withdrawing_a_task_cancels_what_was_asked_of_it_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is repeated where the engine was out of reach, and what has been asked of the new bundle
    by then goes on."""
    put(tmp_path, "pets")
    catalog, stop, tries = Catalog(TASKS, tmp_path), asyncio.Event(), 0
    engine = MemoryEngine(EngineOptions(shard_rows=10), poll_seconds=0.01)
    await catalog.refresh()
    digest = catalog["pets"].served_digest(NUMERICS)
    await engine.pull(Worker("w", {"pets": digest}, [NUMERICS]), 1)

    class Away(EngineSpy):
        def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
            return self.engine.watch(job_id)

        async def submit(self, *asked: Any, **more: Any) -> str:
            return await self.engine.submit(*asked, **more)

    spy = Away(engine, lambda: spy.calls[-1][0] == "cancel" and tries < 2)
    desk = Predictions(Settings(data_dir=tmp_path), spy, catalog, SECRET, KEYS)
    asked = PredictRequest.model_validate({"image": png(), "task": "pets", "n": 30, "n0": 10})

    async def gone(task: str) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            digest = catalog["pets"].served_digest(NUMERICS)
            await engine.pull(Worker("w", {"pets": digest}, [NUMERICS]), 0)
            after.append(await desk.submit(asked, None, None))
        await desk.cancel_stale(task)
        told.set()

    after: list[str] = []
    told = asyncio.Event()
    await catalog.refresh()
    before = [await desk.submit(asked, None, None) for _ in range(2)]
    shutil.rmtree(tmp_path / "pets")
    put(tmp_path, "pets", k=1.5)
    following = asyncio.create_task(catalog.follow(stop, gone=gone))
    try:
        await asyncio.wait_for(told.wait(), 10)
    finally:
        stop.set()
        await following
    states = [(await desk.status(job_id, None)).state for job_id in before + after]
    assert states == [State.CANCELLED, State.CANCELLED, State.QUEUED]
    assert tries == 2
    assert "trying again" in caplog.text
    await desk.close()


@pytest.mark.parametrize("folder", ["../../elsewhere", "/"])
async def test_base_networks_elsewhere_are_refused_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """A folder outside of package and models directory is refused by name, and never walked."""
    base = Base("super-resolution", folder, {"model.safetensors": "0" * 64})
    put(tmp_path / "tasks", "pets", denoiser=asdict(base))
    walked: list[Path] = []

    def noted(path: Path) -> Signature:
        walked.append(path)
        return signature(path)

    monkeypatch.setattr(catalogs, "signature", noted)
    catalog = Catalog(TASKS, tmp_path / "tasks", tmp_path / "models")
    await catalog.refresh()
    assert repr(folder) in catalog.refused["pets"].reason
    assert walked == [tmp_path / "tasks" / "pets"]


async def test_a_network_without_weights_is_not_served(tmp_path: Path) -> None:
    """A bundle that lists no weights for a network that has some is refused, not ready."""
    put(tmp_path, "pets", denoiser=asdict(Base("super-resolution")))
    catalog = Catalog(TASKS, tmp_path)
    await catalog.refresh()
    assert "no safetensors file is listed" in catalog.refused["pets"].reason


def test_a_removed_task_s_jobs_are_cancelled_before_they_count_as_unserved() -> None:
    """The embedded engine waits for more than the catalog's look that cancels them."""
    assert UNSERVED_SECONDS >= 3 * POLL_SECONDS
