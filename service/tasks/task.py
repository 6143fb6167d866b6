"""A task as read from its folders: an adaptation job's, a published bundle's, or both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from models.adaptation.plan import MEASURED_ON, PLAN, Plan, Status

MANIFEST = "manifest.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SETTINGS = ("denoiser", "classifier", "shots", "steps", "epochs", "seed")

Signature = tuple[tuple[str, int, int], ...]
"""Name, time of change (ns) and size (bytes) of each file of a folder."""


def is_task_id(name: str) -> bool:
    """Whether a folder of this name may be a task; `default` is the built-in one's."""
    return _ID.fullmatch(name) is not None and name != "default"


def signature(folder: Path) -> Signature:
    """The folder's signature, empty for a missing folder; raises OSError."""
    try:
        paths = sorted(folder.rglob("*"))
        states = [(path, path.lstat()) for path in paths if not path.is_dir()]
    except FileNotFoundError:
        return ()
    return tuple(
        (path.relative_to(folder).as_posix(), state.st_mtime_ns, state.st_size)
        for path, state in states
    )


def task_status(job: Status, is_published: bool, refusal: str | None = None) -> Status:
    """A task's status, derived from its `job`'s status and its bundle.

    `refusal` is the reason why a published bundle is not served.
    """
    if not is_published:
        return job.changed(state="cancelled", progress=0.0) if job.state == "ready" else job
    if refusal is not None:
        problem = {"kind": "incompatible", "detail": refusal}
        return job.changed(state="failed", progress=0.0, problem=problem)
    if job.state == "ready":
        return job
    return Status("ready", progress=1.0, losses=job.losses, started=job.started)


def job_status(job: Path, bundle: Path) -> Status:
    """The status of the task with these folders of its job and its bundle."""
    status = Status.read(job)  # Read before the bundle: a job is ready once it has one.
    if is_published := (bundle / MANIFEST).is_file():
        status = Status.read(job)  # Read again for later changes.
    return task_status(status, is_published)


@dataclass(frozen=True, slots=True)
class Task:
    """A task as read from its folders; `created` in Unix seconds, `owner` the caller that made it.

    `prompts` maps labels to their words in the template, if these differ from the labels.
    """

    id: str
    name: str
    owner: str | None
    created: float
    labels: tuple[str, ...]
    template: str
    settings: Mapping[str, Any]
    status: Status
    prompts: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of_job(folder: Path, bundle: Path) -> Task:
        """The task of an adaptation job; it is ready once its bundle is published.

        Raises OSError, and ValueError, TypeError, KeyError, AttributeError or RecursionError for
        documents of another format.
        """
        described = json.loads((folder / PLAN).read_text())
        plan, status = Plan.read(folder), job_status(folder, bundle)
        if (
            status.state == "ready" and status.finished is None
        ):  # Its job has not written its end yet.
            manifest = bundle / MANIFEST
            status = status.changed(figures=_figures(manifest), finished=manifest.stat().st_mtime)
        settings = {name: value for name, value in asdict(plan).items() if name in _SETTINGS}
        task = Task(
            id=folder.name,
            name=described["name"],
            owner=described["owner"],
            created=described["created"],
            labels=plan.labels,
            template=plan.template,
            settings=settings,
            status=status.changed(figures=_described(status.figures)),
            prompts=plan.prompts,
        )
        return _checked(task)

    @staticmethod
    def of_bundle(folder: Path) -> Task:
        """The task of a bundle without a job; raises as `of_job` does."""
        manifest = folder / MANIFEST
        described, created = json.loads(manifest.read_text()), manifest.stat().st_mtime
        adaptation, figures = described.get("adaptation", {}), described["figures"]
        task = Task(
            id=folder.name,
            name=described.get("name", ""),
            owner=None,
            created=created,
            labels=described["labels"],
            template=described["template"],
            settings=_settings(described),
            status=Status(
                "ready",
                progress=1.0,
                figures=_described(figures) if adaptation else figures,
                finished=created,
            ),
            prompts=described.get("prompts", {}),
        )
        return _checked(task)


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapted task; of another, the kinds of its networks."""
    if adaptation := manifest.get("adaptation"):
        return {name: adaptation[name] for name in _SETTINGS if name in adaptation}
    return {name: manifest[name]["kind"] for name in ("denoiser", "classifier")}


_STATES = ("queued", "running", "ready", "failed", "cancelled")
_TYPES = TypeAdapter(Task)


def _checked(task: Task) -> Task:
    """The task; raises ValueError for a field of another type or outside JSON."""
    checked = _TYPES.validate_python(asdict(task))
    if checked.status.state not in _STATES:
        raise ValueError(f"the state is {checked.status.state!r}")
    json.dumps(asdict(checked), ensure_ascii=False, allow_nan=False).encode()
    return checked


def _described(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """An adapted task's figures, with the default of `measured_on`."""
    return {"measured_on": MEASURED_ON, **figures} if figures else figures


def _figures(manifest: Path) -> dict[str, Any]:
    """The manifest's figures; empty for a damaged manifest, whose task can be made again."""
    try:
        return dict(json.loads(manifest.read_text())["figures"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
