"""Progress of a job, for readers of its folder, and the problem of a failed one."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

from models.adaptation.limits import PlanError
from models.adaptation.plan import Plan, Status
from models.bundle import BundleError
from models.memory import ran_out
from models.training import Diverged

DRAWN, STEP, TUNED, EVALUATED = 0.323, 1.0, 0.0175, 0.0511
"""Weights in `progress`, from nano's times on a CPU, in steps.

They are for a reference to draw, a step of personalization, a reference to tune on in an epoch, and
one to evaluate with. Source: 5767c93 in docs/decisions/0010-a-shorter-job.md's table.
"""
STATUS_SECONDS = 0.5
"""Shortest time between two writings of a status in which only the progress changed."""


class Progress:
    """The job's status, written at most every STATUS_SECONDS while a stage progresses."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        references = plan.shots * len(plan.labels)
        work = {
            "synthesizing": DRAWN * references,
            "personalizing": STEP * plan.steps,
            "finetuning": TUNED * plan.epochs * references,
            "evaluating": EVALUATED * references,
        }
        self._shares = {stage: part / sum(work.values()) for stage, part in work.items()}
        self._folder = folder
        earlier = Status.read(folder)
        self.status = Status(
            "running",
            started=earlier.started or time.time(),
            losses=earlier.losses,
            attempts=earlier.attempts,
            furthest=earlier.furthest,
        )
        self._written = 0.0
        self._began: float | None = None
        self._found = 0.0
        self._is_first = True

    def stage(self, name: str) -> None:
        """Begin a stage; the previous one, where it never moved, was already complete."""
        if self.status.stage is not None and self._is_first:
            self._found += self._shares[self.status.stage]
        self.status = self.status.changed(stage=name)
        self._is_first = True
        self._move(0.0, at_once=True)

    def moved(self, done: int, whole: int, loss: float | None = None) -> None:
        """Record `done` of `whole` in this stage; the first call's `done` counts as an earlier
        run's.
        """
        if self._is_first:
            self._began = self._began or time.monotonic()
            self._found += done / max(1, whole) * self._shares[str(self.status.stage)]
            self._is_first = False
        if loss is not None:
            losses = {**self.status.losses, str(self.status.stage): round(loss, 5)}
            self.status = self.status.changed(losses=losses)
        self._move(done / max(1, whole))

    def end(self, state: str, **changes: Any) -> None:
        """End the job in `state`."""
        self.status = self.status.changed(
            state=state, stage=None, eta_seconds=None, finished=time.time(), **changes
        )
        self.status.write(self._folder)

    def _move(self, share: float, at_once: bool = False) -> None:
        names, now = list(self._shares), time.monotonic()
        before = names[: names.index(str(self.status.stage))]
        progress = sum(self._shares[name] for name in before)
        progress += share * self._shares[str(self.status.stage)]
        passed, gained = now - (self._began or now), progress - self._found
        eta = round(passed / gained * (1 - progress), 1) if gained > 0.01 else None
        self.status = self.status.changed(progress=round(progress, 4), eta_seconds=eta)
        if at_once or now - self._written > STATUS_SECONDS:
            self.status.write(self._folder)
            self._written = now


def problem_of(error: BaseException) -> dict[str, str]:
    """The kind of a failure, and a detail with the remedy."""
    text = f"{type(error).__name__}: {error}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in text or "quota exceeded" in text:
        return _problem("disk-full", f"The disk is full: delete tasks or make room ({text})")
    if ran_out(error):
        return _problem(
            "out-of-memory",
            f"Memory ran out: stop other work on the device, or take a larger one ({text})",
        )
    if isinstance(error, Diverged):
        return _problem("diverged", f"{error}: retry with another seed, fewer steps or more shots")
    if isinstance(error, PlanError | BundleError):
        return _problem("incompatible", f"The plan does not fit its networks: {error}")
    return _problem("internal", f"{text}; the job's log has the traceback")


def _problem(kind: str, detail: str) -> dict[str, str]:
    return {"kind": kind, "detail": detail}
