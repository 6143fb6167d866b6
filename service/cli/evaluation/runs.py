"""The runs of an evaluation: tasks, sigmas and baselines on the same images."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.certificates.rules import check_certify
from models.evaluation.records import RecordFile
from models.evaluation.results import Run
from service.cli.console import errors
from service.cli.evaluation.attacks import AttackedTask, AttackPlan, run_attacks
from service.cli.evaluation.bundles import local_bundles
from service.cli.evaluation.images import (
    ImageSet,
    LabeledFile,
    check,
    dataset_images,
    digest,
    held_back,
    read_images,
)
from service.cli.evaluation.progress import Watch, watched
from service.cli.evaluation.remote import RemoteTask
from service.cli.evaluation.report import results, write
from service.cli.evaluation.tasks import (
    LocalTask,
    Purification,
    Question,
    Setting,
    Task,
)
from service.client import Client, VouchsafeError
from service.config import Settings
from service.predictions.question import LARGEST_SIGMA, SMALLEST_SIGMA


@dataclass(frozen=True, slots=True)
class Plan:
    """What to evaluate: tasks by id or name, and all else as the command's options have it."""

    names: Sequence[str]
    sigmas: Sequence[float]
    question: Question
    out: Path
    images: Path | None
    dataset: str | None
    root: Path | None
    cifar10: Path | None
    limit: int | None
    baselines: Sequence[str]
    only_baselines: bool
    k: float | None
    server: str | None
    key_file: Path | None
    at_once: int
    attacks: AttackPlan | None
    purification: Purification


def evaluated(plan: Plan, settings: Settings) -> dict[str, Any]:
    """The document of results.json, written to `plan.out` with the other files.

    Raises ValueError and OSError for a field or file that cannot be used, before any work where it
    can be seen then; BundleError for a task's networks; ProblemError and Unreachable for a server
    that fails later.
    """
    for sigma in plan.sigmas:
        _check_sigma(sigma, SMALLEST_SIGMA, LARGEST_SIGMA)
        asked = plan.question
        check_certify(asked.n0, asked.n, sigma, asked.alpha, asked.method)
    found = _image_set(plan)
    if plan.server is None:
        return _run_all(plan, _settings(plan, _local(settings, plan)), found)
    if plan.baselines or plan.attacks or plan.k is not None:
        raise ValueError("--baseline, --attack and --k need the networks here: leave out --server")
    key = plan.key_file.read_text().strip() if plan.key_file else None
    with Client(plan.server, key=key) as client:
        return _run_all(plan, _settings(plan, _remote(client, plan.names, plan.at_once)), found)


def _image_set(plan: Plan) -> ImageSet:
    options = {"--images": plan.images, "--dataset": plan.dataset, "--cifar10": plan.cifar10}
    if len(given := [option for option, value in options.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(given)} are two sets of images: give one of them")
    if (plan.dataset is None) != (plan.root is None):
        raise ValueError(
            "--dataset and --root need each other: a name, and the folder of its files"
        )
    if plan.dataset is not None and plan.root is not None:
        return dataset_images(plan.dataset, plan.root)
    return held_back(plan.cifar10) if plan.cifar10 else read_images(plan.images)


def _check_sigma(sigma: float, least: float, largest: float) -> None:
    if not least <= sigma <= largest:
        raise ValueError(f"sigma = {sigma}: must be from {least} to {largest}")


def _local(settings: Settings, plan: Plan) -> list[LocalTask]:
    """The tasks of this machine; raises ValueError for an unknown or ambiguous name."""
    from models.smoothing import tried_runtime

    bundles = local_bundles(settings, plan.names)
    if plan.k is not None:
        bundles = [replace(bundle, k=plan.k) for bundle in bundles]
    folder = settings.models_folder
    tasks = [
        LocalTask(
            name,
            bundle,
            tried_runtime(settings.runtime, bundle, folder),
            folder,
            plan.purification,
        )
        for name, bundle in zip(plan.names, bundles, strict=True)
    ]
    if "purified" in plan.baselines:
        tasks[0].purifier  # noqa: B018 - refuses networks that cannot purify before any work
    return tasks


def _remote(client: Client, names: Sequence[str], at_once: int) -> list[RemoteTask]:
    """The tasks of a server; raises ValueError for an unknown name and a server without answer."""
    try:
        return [RemoteTask(name, client, at_once) for name in names]
    except VouchsafeError as error:
        raise ValueError(f"the server's tasks cannot be read: {error}") from error


def _settings(plan: Plan, tasks: Sequence[Task]) -> list[tuple[Task, Setting]]:
    """Every run, those of the first task first; raises ValueError for a sigma that is too large."""
    if plan.only_baselines and not plan.baselines:
        raise ValueError("--only-baselines leaves no run: add --baseline")
    planned: list[tuple[Task, Setting]] = []
    for name, task in zip(plan.names, tasks, strict=True):
        if plan.only_baselines:
            break
        for sigma in plan.sigmas:
            _check_sigma(sigma, SMALLEST_SIGMA, task.largest_sigma)
            planned.append((task, _setting(name, sigma, None)))
    if "none" in plan.baselines:
        planned += [(tasks[0], _setting("none", sigma, "none")) for sigma in plan.sigmas]
    if "undefended" in plan.baselines:
        planned.append((tasks[0], _setting("undefended", None, "undefended")))
    if "purified" in plan.baselines:
        planned.append((tasks[0], _setting("purified", None, "purified")))
    stems = [setting.stem for _, setting in planned]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise ValueError(f"two runs would be {twice}: give each task and sigma once, tasks by id")
    return planned


def _setting(name: str, sigma: float | None, baseline: str | None) -> Setting:
    stem = re.sub(r"[^\w.-]+", "_", name)
    if sigma is None:
        return Setting(name, stem, None, baseline)
    return Setting(f"{name}, sigma {sigma:g}", f"{stem}-{sigma:g}", sigma, baseline)


def _run_all(
    plan: Plan, planned: Sequence[tuple[Task, Setting]], found: ImageSet
) -> dict[str, Any]:
    """Run what `plan.out` lacks, and write and return the results.

    A picture that cannot be used is refused first: without it the set would be another one.
    """
    question, out = plan.question, plan.out
    files = found.chosen([task.labels for task, _ in planned], plan.limit)
    check(files, planned[0][0].resolution)
    to_attack = _to_attack(plan, planned)
    sha256 = digest(files)
    images = {"source": found.source, "images": len(files), "of": found.total, "sha256": sha256}
    with _alone_in(out):
        kept = [
            RecordFile(out / setting.stem, {"images": sha256, **task.settings(setting, question)})
            for task, setting in planned
        ]
        missing = [[file for file in files if file.index not in each.records] for each in kept]
        runs = []
        with watched(sum(map(len, missing))) as watch:
            for (task, setting), file, left in zip(planned, kept, missing, strict=True):
                runs.append(_run(task, setting, question, file, left, watch))
        document = results(runs, images)
        if to_attack:
            for name, own in run_attacks(to_attack, runs, files, sha256, out).items():
                document["runs"][name]["attacks"] = own
        for path in write(runs, document, out):
            errors.print(f"wrote {path}")
    return document


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other evaluations out of it: they would replace its files.

    Raises ValueError where another one is in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = "another evaluation writes to it: choose another --out"
            raise ValueError(f"{out}: {reason}") from error
        yield


def _to_attack(plan: Plan, planned: Sequence[tuple[Task, Setting]]) -> list[AttackedTask]:
    """Every run that is to be attacked; raises ValueError as `AttackPlan.check` does."""
    if plan.attacks is None:
        return []
    local = [(task, setting) for task, setting in planned if isinstance(task, LocalTask)]
    plan.attacks.check(local, plan.question.alpha)
    return [AttackedTask(*each, plan.question, plan.attacks) for each in local]


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
    records = kept.sorted()
    settings = task.settings(setting, question)
    return Run(setting.name, settings, records, certifies=setting.sigma is not None)
