"""The command `evaluate`: measures tasks on labeled images."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from models.bundle import DEFAULT_TASK, Bundle, BundleError, read_bundle
from models.certificates.rules import check_certify
from models.evaluation.records import RecordFile
from models.evaluation.results import Run
from service.cli.console import errors, read_settings, tell
from service.cli.evaluation.images import ImageSet, LabeledFile, digest, held_back, read_images
from service.cli.evaluation.progress import Watch, watched
from service.cli.evaluation.report import results, tables, write
from service.cli.evaluation.tasks import (
    LocalTask,
    Question,
    RemoteTask,
    Setting,
    Task,
)
from service.cli.predict import Alpha, SelectionRows
from service.client import Client, VouchsafeError
from service.config import Settings
from service.predictions.question import LARGEST_SIGMA, SMALLEST_SIGMA

if TYPE_CHECKING:
    from service.tasks.catalog import Catalog

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""


class Rule(StrEnum):
    """The rules for radii from a fixed number of rows."""

    TWO_SIDED = "two-sided"
    COHEN = "cohen"


class Baseline(StrEnum):
    """The first task's classifier without noise, and under noise without a denoiser."""

    UNDEFENDED = "undefended"
    NONE = "none"


def evaluate(
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task's id or name; repeat to compare.", show_default="default"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="A folder with a sub-folder of pictures for each label, or a CSV of paths and "
            "labels.",
            show_default="500 test images of CIFAR-10",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; the same command resumes in it.")
    ] = Path("evaluation"),
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="Noise strength, pixels in [0,1]; repeatable.", show_default="0.25"),
    ] = None,
    alpha: Alpha = 0.001,
    n0: SelectionRows = 100,
    n: Annotated[int, typer.Option("--n", help="Noise rows that bound its probability.")] = 1000,
    method: Annotated[
        Rule, typer.Option(help="The rule of the radii; both rules are in results.json.")
    ] = Rule.TWO_SIDED,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only LIMIT of the images, evenly spread.")
    ] = None,
    baseline: Annotated[
        list[Baseline] | None,
        typer.Option(
            help="Also the first task's classifier without a denoiser, or without noise too; "
            "repeatable."
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a running service, whose workers compute.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the server's API key.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Images in the server at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the noise; not of a server's.")] = 0,
    k: Annotated[float | None, typer.Option(help="Another timestep correction factor.")] = None,
    cifar10: Annotated[
        Path | None, typer.Option(help="Take the held-back training images of this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json, no table.")] = False,
) -> None:
    """Measure tasks on labeled images: clean and certified accuracy, ACR, a curve.

    Exits with 2 for a field or file that cannot be used, and with 1 if the server fails.
    """
    names, sigmas = task or ["default"], sigma or [0.25]
    question = Question(n0, n, alpha, method.value, seed)
    settings = read_settings()
    try:
        for each in sigmas:
            _check_sigma(each, SMALLEST_SIGMA, LARGEST_SIGMA)
            check_certify(n0, n, each, alpha, method.value)
        found = held_back(cifar10) if cifar10 else read_images(images)
        with ExitStack() as open_things:
            tasks: Sequence[Task]
            if server is None:
                tasks = _local(settings, names, k)
            else:
                if baseline or k is not None:
                    _fail("--baseline and --k need the networks here: leave out --server")
                key = key_file.read_text().strip() if key_file else None
                client = open_things.enter_context(Client(server, key=key))
                tasks = _remote(client, names, at_once)
            planned = _planned(names, tasks, sigmas, baseline or [])
            document = _evaluate(found, planned, question, limit, out)
    except KeyboardInterrupt:
        errors.print(f"Stopped. {out} keeps every image so far: the same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    except VouchsafeError as error:
        tell(f"{error}; {out} keeps every image so far: the same command goes on")
        raise typer.Exit(1) from error
    except (ValueError, BundleError) as error:
        _fail(error)
    if as_json:
        print(json.dumps(document, indent=2))
        return
    for table in tables(document):
        Console().print(table)


def _fail(reason: object) -> NoReturn:
    tell(reason)
    raise typer.Exit(2)


def _check_sigma(sigma: float, least: float, largest: float) -> None:
    if not least <= sigma <= largest:
        raise ValueError(f"sigma = {sigma}: must be from {least} to {largest}")


def _local(settings: Settings, names: Sequence[str], k: float | None) -> list[LocalTask]:
    """The tasks of this machine; raises ValueError for an unknown or ambiguous name."""
    from models.smoothing import tried_runtime
    from service.tasks.catalog import Catalog

    catalog = Catalog(
        {"default": read_bundle(DEFAULT_TASK)}, settings.tasks_folder, settings.models_folder
    )
    asyncio.run(catalog.refresh())
    bundles = [_named(catalog, name) for name in names]
    if k is not None:
        bundles = [replace(bundle, k=k) for bundle in bundles]
    return [
        LocalTask(name, bundle, tried_runtime(settings.runtime, bundle), settings.models_folder)
        for name, bundle in zip(names, bundles, strict=True)
    ]


def _remote(client: Client, names: Sequence[str], at_once: int) -> list[RemoteTask]:
    """The tasks of a server; raises ValueError for an unknown name and a server without answer."""
    try:
        return [RemoteTask(name, client, at_once) for name in names]
    except VouchsafeError as error:
        raise ValueError(f"the server's tasks cannot be read: {error}") from error


def _named(catalog: Catalog, name: str) -> Bundle:
    if name in catalog:
        return catalog[name]
    if name in catalog.refused:
        raise ValueError(f"task {name}: {catalog.refused[name].reason}")
    found = [bundle for bundle in catalog.values() if bundle.name == name]
    if len(found) != 1:
        known = ", ".join(bundle.name or task for task, bundle in catalog.items())
        raise ValueError(f"there are {len(found)} tasks {name!r}; the tasks are {known}")
    return found[0]


def _planned(
    names: Sequence[str],
    tasks: Sequence[Task],
    sigmas: Sequence[float],
    baselines: Sequence[Baseline],
) -> list[tuple[Task, Setting]]:
    """Every run, those of the first task first; raises ValueError for a sigma that is too large."""
    planned: list[tuple[Task, Setting]] = []
    for name, task in zip(names, tasks, strict=True):
        for sigma in sigmas:
            _check_sigma(sigma, SMALLEST_SIGMA, task.largest_sigma)
            planned.append((task, _setting(name, sigma, None)))
    if Baseline.NONE in baselines:
        planned += [(tasks[0], _setting("none", sigma, "none")) for sigma in sigmas]
    if Baseline.UNDEFENDED in baselines:
        planned.append((tasks[0], _setting("undefended", None, "undefended")))
    stems = [setting.stem for _, setting in planned]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ValueError(f"two runs would be {twice}: give each task and sigma once, tasks by id")
    return planned


def _setting(name: str, sigma: float | None, baseline: str | None) -> Setting:
    stem = re.sub(r"[^\w.-]+", "_", name)
    if sigma is None:
        return Setting(name, stem, None, baseline)
    return Setting(f"{name}, sigma {sigma:g}", f"{stem}-{sigma:g}", sigma, baseline)


def _evaluate(
    found: ImageSet,
    planned: Sequence[tuple[Task, Setting]],
    question: Question,
    limit: int | None,
    out: Path,
) -> dict[str, Any]:
    """Run what `out` lacks, and write and return the results."""
    files = found.chosen([task.labels for task, _ in planned], limit)
    images = {"source": found.source, "images": len(files), "sha256": digest(files)}
    out.mkdir(parents=True, exist_ok=True)
    kept = [
        RecordFile(
            out / setting.stem, {"images": images["sha256"], **task.settings(setting, question)}
        )
        for task, setting in planned
    ]
    missing = [[file for file in files if file.index not in each.records] for each in kept]
    runs = []
    with watched(sum(map(len, missing))) as watch:
        for (task, setting), file, left in zip(planned, kept, missing, strict=True):
            runs.append(_run(task, setting, question, file, left, watch))
    document = results(runs, images)
    for path in write(runs, document, out):
        errors.print(f"wrote {path}")
    return document


def _run(
    task: Task,
    setting: Setting,
    question: Question,
    kept: RecordFile,
    left: Sequence[LabeledFile],
    watch: Watch,
) -> Run:
    with kept:
        if left:
            for record in task.records(left, setting, question):
                kept.add(record)
                watch.advance(setting.name)
    records = [kept.records[index] for index in sorted(kept.records)]
    settings = task.settings(setting, question)
    return Run(setting.name, settings, records, certifies=setting.sigma is not None)
