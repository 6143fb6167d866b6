"""The command `adapt`: makes a task from labels, of a file or a data set."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from service.cli.console import errors, read_settings
from service.config import Settings
from service.errors import Problem
from service.secrets import load_secret
from service.validation import invalid_fields

if TYPE_CHECKING:
    from models.adaptation.plan import Status
    from service.tasks.store import Store
    from service.tasks.task import Task

LOOK_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Seconds between two lines of one stage, if standard error is no terminal."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


def adapt(
    labels: Annotated[
        Path | None,
        typer.Option(help="A text file, one label a line; after a tab its prompt, if another."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A data set whose labels and template are taken: docs/datasets.md."),
    ] = None,
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
    denoiser: Annotated[
        str, typer.Option(help="The denoiser set to adapt, or a registered name.")
    ] = "nano",
    classifier: Annotated[
        str | None,
        typer.Option(
            help="The classifier set or a registered name; the denoiser's own by default."
        ),
    ] = None,
    allow_unknown_labels: Annotated[
        bool, typer.Option("--allow-unknown-labels", help="Take labels the set never saw.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Contact sheet of the pictures made.")] = Path(
        "references.png"
    ),
) -> None:
    """Make a task from labels alone; the same labels and settings resume a stopped run."""
    from service.tasks.contact_sheet import contact_sheet

    given, usual = _words(labels, dataset)
    fields = {
        "labels": [_field(each) for each in given],
        "template": usual if template is None else template,
        "shots": shots,
        "steps": steps,
        "epochs": epochs,
        "seed": seed,
        "name": name,
        "denoiser": denoiser,
        "classifier": classifier,
        "allow_unknown_labels": allow_unknown_labels,
    }
    settings = read_settings()
    with _disk_errors_reported(settings.data_dir):
        store = open_store(settings)
        task = _made(store, fields)
    with _disk_errors_reported(store.jobs / task.id):
        ended = _run(store, task)
    if ended is None or ended.status.state != "ready":
        problem = ended.status.problem if ended else None
        errors.print(
            f"vouchsafe: {problem['detail'] if problem else 'the task was removed'}", style="red"
        )
        raise typer.Exit(1)
    print(f"task {ended.id}: {ended.name}")
    print(json.dumps(dict(ended.status.figures), indent=2))
    print(f"use it: vouchsafe predict --task {ended.id} IMAGE")
    print(f"measure it on your own pictures: vouchsafe evaluate --task {ended.id} --images FOLDER")
    with _disk_errors_reported(out):
        if pictures := contact_sheet(store, ended, out):
            print(f"{pictures} pictures are in {out}")


@contextmanager
def _disk_errors_reported(path: Path) -> Iterator[None]:
    """Exit with 1 and one line for an OSError: the file, else `path`, and the reason."""
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


def read_labels(path: Path) -> list[str | tuple[str, str]]:
    """The labels of a file, one a line; a tab separates a label and its prompt.

    Exits with 2 for a file that is not UTF-8.
    """
    parts = [line.strip().partition("\t") for line in _lines(path) if line.strip()]
    return [(label, prompt) if tab else label for label, tab, prompt in parts]


def _words(
    path: Path | None, dataset: str | None
) -> tuple[list[str | tuple[str, str]], str | None]:
    """The labels of a file, or those of a data set and its template.

    Exits with 2 unless it is one of the two, and for an unknown data set.
    """
    if path is not None and dataset is None:
        return read_labels(path), None
    if path is not None or dataset is None:
        errors.print("vouchsafe: give --labels or --dataset, one of the two", style="red")
        raise typer.Exit(2)
    from models.evaluation.datasets.registry import known, prompt_template

    try:
        known(dataset)
    except ValueError as error:
        errors.print(f"vouchsafe: {error}", style="red")
        raise typer.Exit(2) from error
    return dataset_labels(dataset), prompt_template(dataset)


def dataset_labels(name: str) -> list[str | tuple[str, str]]:
    """A data set's labels; with a prompt those that the text encoder would read as other words."""
    from models.evaluation.datasets.registry import class_names
    from models.zoo.captions import clean_caption

    read = {label: clean_caption(label) for label in class_names(name).values()}
    return [label if label.lower() == word else (label, word) for label, word in read.items()]


def _field(label: str | tuple[str, str]) -> str | dict[str, str]:
    """A label as a field of TaskRequest."""
    return label if isinstance(label, str) else {"label": label[0], "prompt": label[1]}


def open_store(settings: Settings) -> Store:
    """The tasks of the settings' data directory."""
    from service.tasks.store import Store

    return Store(settings, load_secret(settings.data_dir, settings.noise_secret_file))


def _made(store: Store, fields: dict[str, Any]) -> Task:
    """The task in the store; exits with 2 for a Problem. Raises OSError for a full disk."""
    from service.tasks.schemas import TaskRequest

    try:
        try:
            request = TaskRequest.model_validate(fields)
        except ValidationError as error:
            raise invalid_fields(error.errors(), TaskRequest) from error
        plan = request.plan(store.models)
        return store.create(plan, request.name_of(plan), None)
    except Problem as problem:
        if isinstance(problem.__cause__, OSError):
            raise problem.__cause__ from None
        errors.print(f"vouchsafe: {problem}", style="red")
        raise typer.Exit(2) from problem


def _run(store: Store, task: Task) -> Task | None:
    """The task once its job has ended, here or in a server; None for a removed task."""
    from models.adaptation.plan import Status
    from service.tasks import process

    job = store.jobs / task.id
    run = process.Run(job, store.tasks, process.JOB, models=store.models)
    try:
        with _progress() as show:
            show(Status.read(job))
            while not run.step():
                show(Status.read(job))
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


@contextmanager
def _progress() -> Iterator[Callable[[Status], None]]:
    """Show a job's status on standard error: a bar on a terminal, else lines."""
    if not errors.is_terminal:
        yield ProgressLines().show
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task("queued", total=1.0)
        yield lambda status: progress.update(
            bar, completed=status.progress, description=_described(status)
        )


class ProgressLines:
    """A job's progress as lines on standard error: one a stage, and one every 10 seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._printed = 0.0

    def show(self, status: Status) -> None:
        """Print a line for a new stage, or if the last line is 10 seconds old."""
        stage, now = status.stage or status.state, self._clock()
        if stage != self._stage or now - self._printed >= LINE_SECONDS:
            self._stage, self._printed = stage, now
            errors.print(f"{status.progress:4.0%} {_described(status)}")


def _described(status: Status) -> str:
    words = [status.stage or status.state]
    if (loss := status.losses.get(status.stage or "")) is not None:
        words.append(f"loss {loss:.4g}")
    if status.eta_seconds is not None:
        minutes, seconds = divmod(round(status.eta_seconds), 60)
        words.append(f"{minutes}:{seconds:02} left")
    return ", ".join(words)
