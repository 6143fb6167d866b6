"""The commands about tasks: `adapt` makes one, `models` lists, shows, verifies and removes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column, Table

from models.adaptation.plan import Status
from models.bundle import DEFAULT_TASK, BundleError, read_bundle
from service.config import Settings, load_secret
from service.errors import Problem
from service.schemas import invalid_fields
from service.tasks import supervisor
from service.tasks.schemas import TaskRequest
from service.tasks.sheet import contact_sheet
from service.tasks.store import Store
from service.tasks.task import Task

LOOK_SECONDS = 0.2
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

models = typer.Typer(help="The tasks on this machine.", no_args_is_help=True)
errors = Console(stderr=True, markup=False, highlight=False)

TaskId = Annotated[str, typer.Argument(help="A task's id; `default` is the built-in one's.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def adapt(
    labels: Annotated[Path, typer.Option(help="A text file, one label a line.")],
    template: Annotated[
        str | None, typer.Option(help="A sentence with {} where a label goes.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Reference pictures of each label.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the denoiser's personalization; 0 leaves it.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the classifier's fine-tuning; 0 leaves it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed is another task.")] = 0,
    name: Annotated[str | None, typer.Option(help="What people call the task.")] = None,
    denoiser: Annotated[str, typer.Option(help="The denoiser set to adapt.")] = "nano",
    classifier: Annotated[
        str | None, typer.Option(help="The classifier set; the denoiser's own unless given.")
    ] = None,
    allow_unknown_labels: Annotated[
        bool, typer.Option("--allow-unknown-labels", help="Take labels the set never saw.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Contact sheet of the pictures made.")] = Path(
        "references.png"
    ),
) -> None:
    """Make a task from labels alone; the same labels and settings go on where they were stopped."""
    fields = {
        "labels": [line.strip() for line in _lines(labels) if line.strip()],
        "template": template,
        "shots": shots,
        "steps": steps,
        "epochs": epochs,
        "seed": seed,
        "name": name,
        "denoiser": denoiser,
        "classifier": classifier,
        "allow_unknown_labels": allow_unknown_labels,
    }
    store = _store()
    task = _made(store, fields)
    ended = _run(store, task)
    if ended is None or ended.status.state != "ready":
        told = ended.status.problem if ended else None
        errors.print(
            f"vouchsafe: {told['detail'] if told else 'the task was removed'}", style="red"
        )
        raise typer.Exit(1)
    pictures = contact_sheet(store, ended, out)
    print(f"task {ended.id}: {ended.name}")
    print(json.dumps(dict(ended.status.figures), indent=2))
    if pictures:
        print(f"{pictures} pictures are in {out}")
    print(f"ask it: vouchsafe predict --task {ended.id} IMAGE")


def _lines(labels: Path) -> list[str]:
    try:
        return labels.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        errors.print(f"{labels}: is not UTF-8 text: {error}", style="red")
        raise typer.Exit(2) from error


def _store() -> Store:
    settings = Settings()
    return Store(settings, load_secret(settings.data_dir))


def _made(store: Store, fields: dict[str, Any]) -> Task:
    """The task in the store; exits with 2 where it cannot be."""
    try:
        try:
            asked = TaskRequest.model_validate(fields)
        except ValidationError as error:
            raise invalid_fields(error.errors(), TaskRequest) from error
        plan = asked.plan()
        return store.create(plan, asked.name_of(plan), None)
    except Problem as problem:
        errors.print(f"vouchsafe: {problem}", style="red")
        raise typer.Exit(2) from problem


def _run(store: Store, task: Task) -> Task | None:
    """The task once its job has ended here or in a server, or None where it was removed."""
    job = store.jobs / task.id
    run = supervisor.Run(job, store.tasks, supervisor.JOB)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    try:
        with Progress(*columns, console=errors, transient=True) as progress:
            bar = progress.add_task("queued", total=1.0)
            while not run.step():
                status = Status.read(job)
                progress.update(bar, completed=status.progress, description=_described(status))
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        errors.print(
            f"Stopped. Task {task.id} is kept: the same command goes on where it was stopped, and "
            "so does a running server."
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        run.stop()
    return store.find(task.id)


def _described(status: Status) -> str:
    words = [status.stage or status.state]
    if (loss := status.losses.get(status.stage or "")) is not None:
        words.append(f"loss {loss:.4g}")
    if status.eta_seconds is not None:
        minutes, seconds = divmod(round(status.eta_seconds), 60)
        words.append(f"{minutes}:{seconds:02} left")
    return ", ".join(words)


def _all(store: Store) -> list[Task]:
    """Every task, the built-in one first."""
    bundle = read_bundle(DEFAULT_TASK)
    default = Task(
        id="default",
        name=bundle.name,
        owner=None,
        created=(DEFAULT_TASK / "manifest.json").stat().st_mtime,
        labels=bundle.labels,
        template=bundle.template,
        settings={},
        status=Status("ready", progress=1.0, figures=bundle.figures),
    )
    return [default, *store.all()]


def _found(store: Store, task_id: str) -> Task:
    """The task of this id; exits with 1 where there is none."""
    for task in _all(store):
        if task.id == task_id:
            return task
    errors.print(f"vouchsafe: there is no task {task_id}", style="red")
    raise typer.Exit(1)


def _document(task: Task, used: int) -> dict[str, Any]:
    status = task.status
    return {
        "id": task.id,
        "name": task.name,
        "state": status.state,
        "stage": status.stage,
        "progress": status.progress,
        "eta_seconds": status.eta_seconds,
        "problem": status.problem,
        "labels": list(task.labels),
        "template": task.template,
        "settings": dict(task.settings),
        "figures": dict(status.figures),
        "created": task.created,
        "started": status.started,
        "finished": status.finished,
        "bytes": used,
    }


@models.command("list")
def list_tasks(as_json: AsJson = False) -> None:
    """List every task, ready or not."""
    store = _store()
    used = store.usage()
    told = [_document(task, used.get(task.id, 0)) for task in _all(store)]
    if as_json:
        print(json.dumps(told, indent=2))
        return
    table = Table(Column("id", min_width=32), "name", "state", "labels", "MiB")
    for task in told:
        state = task["state"] + (f" {task['progress']:.0%}" if task["state"] == "running" else "")
        size = f"{task['bytes'] / 2**20:.1f}" if task["bytes"] else ""
        table.add_row(task["id"], escape(task["name"]), state, str(len(task["labels"])), size)
    Console().print(table)


@models.command()
def show(task_id: TaskId, as_json: AsJson = False) -> None:
    """Show all that is known of one task."""
    store = _store()
    told = _document(_found(store, task_id), store.usage().get(task_id, 0))
    if as_json:
        print(json.dumps(told, indent=2))
        return
    table = Table(show_header=False)
    for field, value in told.items():
        plain = value if isinstance(value, str) else json.dumps(value)
        table.add_row(field, escape(plain))
    Console().print(table)


@models.command()
def verify(
    task_id: Annotated[str | None, typer.Argument(help="One task's id; all unless given.")] = None,
) -> None:
    """Check every hash of a task's bundle and of the networks it builds on; 1 where one differs."""
    store = _store()
    tasks = [_found(store, task_id)] if task_id else _all(store)
    wrong = 0
    for task in tasks:
        if task.status.state != "ready":
            print(f"{task.id}: {task.status.state}, nothing to verify")
            continue
        try:
            _verify(DEFAULT_TASK if task.id == "default" else store.tasks / task.id, task.id)
            print(f"{task.id}: as its manifest states")
        except BundleError as error:
            wrong += 1
            errors.print(f"{task.id}: {error}", style="red")
    if wrong:
        raise typer.Exit(1)


def _verify(folder: Path, task_id: str) -> None:
    bundle = read_bundle(folder)
    if bundle.id != task_id:
        raise BundleError(f"{folder}: the manifest says the id {bundle.id!r}")
    bundle.denoiser.verified()
    bundle.classifier.verified()


@models.command()
def remove(task_id: TaskId) -> None:
    """Remove a task and end its job."""
    try:
        _store().delete(task_id)
    except Problem as problem:
        detail = "the default task ships with the project" if task_id == "default" else problem
        errors.print(f"vouchsafe: {detail}", style="red")
        raise typer.Exit(1) from problem
    print(f"{task_id}: removed")
