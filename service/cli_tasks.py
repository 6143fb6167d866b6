"""The command that makes a task: `adapt`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from models.adaptation.plan import Status
from service import logs
from service.config import Settings, load_secret
from service.errors import Problem
from service.schemas import invalid_fields
from service.tasks import runs
from service.tasks.schemas import TaskRequest
from service.tasks.sheet import contact_sheet
from service.tasks.store import Store
from service.tasks.task import Task

LOOK_SECONDS = 0.2
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

errors = Console(stderr=True, markup=False, highlight=False)


def tell(reason: object) -> None:
    """Say in one line why the process ends, as a record where its log is in JSON."""
    if logs.in_json():
        logging.getLogger("vouchsafe").critical("%s", reason)
    else:
        errors.print(f"vouchsafe: {reason}", style="red", soft_wrap=True)


def adapt(
    labels: Annotated[
        Path,
        typer.Option(help="A text file, one label a line; after a tab its prompt, if another."),
    ],
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
        "labels": [_label(line) for line in _lines(labels) if line.strip()],
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
    with _disk_trouble_told(Settings().data_dir):
        store = open_store()
        task = _made(store, fields)
    with _disk_trouble_told(store.jobs / task.id):
        ended = _run(store, task)
    if ended is None or ended.status.state != "ready":
        told = ended.status.problem if ended else None
        errors.print(
            f"vouchsafe: {told['detail'] if told else 'the task was removed'}", style="red"
        )
        raise typer.Exit(1)
    print(f"task {ended.id}: {ended.name}")
    print(json.dumps(dict(ended.status.figures), indent=2))
    print(f"ask it: vouchsafe predict --task {ended.id} IMAGE")
    with _disk_trouble_told(out):
        if pictures := contact_sheet(store, ended, out):
            print(f"{pictures} pictures are in {out}")


@contextmanager
def _disk_trouble_told(path: Path) -> Iterator[None]:
    """Exits with 1 and one line where the disk takes nothing: which file, else `path`, and why."""
    try:
        yield
    except OSError as error:
        errors.print(f"vouchsafe: {error.filename or path}: {error.strerror or error}", style="red")
        raise typer.Exit(1) from error


def _lines(labels: Path) -> list[str]:
    try:
        return labels.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        errors.print(f"{labels}: is not UTF-8 text: {error}", style="red")
        raise typer.Exit(2) from error


def _label(line: str) -> str | dict[str, str]:
    """A line of the labels file as it is asked for; a tab stands between label and prompt."""
    label, tab, prompt = line.strip().partition("\t")
    return {"label": label, "prompt": prompt} if tab else label


def open_store() -> Store:
    """The tasks of the settings' data directory."""
    settings = Settings()
    return Store(settings, load_secret(settings.data_dir, settings.noise_secret_file))


def _made(store: Store, fields: dict[str, Any]) -> Task:
    """The task in the store; exits with 2 where it cannot be. Raises OSError for a full disk."""
    try:
        try:
            asked = TaskRequest.model_validate(fields)
        except ValidationError as error:
            raise invalid_fields(error.errors(), TaskRequest) from error
        plan = asked.plan(store.models)
        return store.create(plan, asked.name_of(plan), None)
    except Problem as problem:
        if isinstance(problem.__cause__, OSError):
            raise problem.__cause__ from None
        errors.print(f"vouchsafe: {problem}", style="red")
        raise typer.Exit(2) from problem


def _run(store: Store, task: Task) -> Task | None:
    """The task once its job has ended here or in a server, or None where it was removed."""
    job = store.jobs / task.id
    run = runs.Run(job, store.tasks, runs.JOB, models=store.models)
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
