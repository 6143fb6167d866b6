"""Attacks of an evaluation: every setting's answers at clean and at attacked images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import kinds
from models.certificates.evidence import total_variation
from models.certificates.rules import check_predict, predict
from models.evaluation.attacks.records import AttackRecord, attack_figures, clean_figures
from models.evaluation.records import OutcomeFile
from models.evaluation.results import Run
from service.cli.evaluation.images import LabeledFile
from service.cli.evaluation.progress import Watch, watched
from service.cli.evaluation.tasks import LocalTask, Question, Setting, nonzero, without_denoiser

if TYPE_CHECKING:
    from numpy.typing import NDArray

EPSILONS = (0.25, 0.5, 1.0)
"""Without --eps: l2, pixels in [0,1]."""

Attack = tuple[str | None, float]
CLEAN: Attack = (None, 0.0)


@dataclass(frozen=True, slots=True)
class AttackPlan:
    """The attacks by name, each at every eps; the rest as the command's options have it.

    PREDICT with `n` rows answers at clean and at attacked images.
    """

    names: Sequence[str]
    epsilons: Sequence[float]
    steps: int
    rows: int
    batch_rows: int
    n: int

    def check(self, planned: Sequence[tuple[LocalTask, Setting]], alpha: float) -> None:
        """Raises ValueError, with field, value and limit, for what cannot be attacked so."""
        from models.evaluation.attacks.registry import PACKAGES, WITHOUT_GRADIENTS

        for eps in self.epsilons:
            if not 0 < eps < math.inf:
                raise ValueError(f"eps = {eps}: must be finite and greater than 0")
        alone = [name for name in self.names if name in PACKAGES]
        for name in alone:
            if find_spec(PACKAGES[name]) is None:
                raise ValueError(
                    f"attack = {name}: needs {PACKAGES[name]}: install the extra bench"
                )
        if alone and all(setting.baseline != "undefended" for _, setting in planned):
            raise ValueError(
                f"attack = {alone[0]}: is for undefended classifiers, and no run has one: add "
                "--baseline undefended"
            )
        differentiated = sorted({*self.names} - WITHOUT_GRADIENTS)
        for task, setting in planned:
            kind = task.bundle.classifier.kind
            if differentiated and not kinds.gives_gradients(kind):
                raise ValueError(
                    f"attack = {differentiated[0]}: task {task.name} has a classifier of kind "
                    f"{kind}, which gives no gradients; use {', '.join(WITHOUT_GRADIENTS)}"
                )
            if setting.sigma is not None:
                check_predict(self.n, alpha, total_variation(_shape(task), setting.sigma))


class AttackedTask:
    """A task under one setting, with its answers at clean and at attacked images.

    An attack is a name with an eps; CLEAN stands for none.
    """

    def __init__(
        self, task: LocalTask, setting: Setting, question: Question, plan: AttackPlan
    ) -> None:
        from models.evaluation.attacks.registry import PACKAGES

        self.name = setting.name
        self.attacks: list[Attack] = [CLEAN]
        for name in plan.names:
            if setting.baseline == "undefended" or name not in PACKAGES:
                self.attacks += [(name, eps) for eps in plan.epsilons]
        self._task, self._setting, self._question, self._plan = task, setting, question, plan

    def outcomes(self, attack: Attack, images: str, out: Path) -> OutcomeFile[AttackRecord]:
        """The file of an attack's records in `out`; `images` is the digest of the images."""
        name, eps = attack
        settings = dict(self._task.settings(self._setting, self._question))
        for other in ("n0", "n", "method"):
            settings.pop(other, None)
        settings |= {"images": images, "seed": self._question.seed}
        if self._setting.sigma is not None:
            settings["predict_n"] = self._plan.n
        if name is not None:
            steps, rows = self._plan.steps, self._plan.rows
            settings |= {"attack": name, "eps": eps, "steps": steps, "rows": rows}
        stem = f"{self._setting.stem}-{name or 'predict'}" + (f"-{eps:g}" if name else "")
        return OutcomeFile(AttackRecord, out / stem, settings)

    def record(self, file: LabeledFile, attack: Attack, clean: AttackRecord | None) -> AttackRecord:
        """The answer at what the attack finds, or at the image itself.

        An image whose `clean` answer is not the right one is not attacked: its record is that one.
        """
        from models.evaluation.attacks.grid import distance
        from models.evaluation.attacks.registry import Strength, Target, attacked

        if clean is not None and not clean.correct:
            return replace(clean, seconds=0.0)
        began, pixels = time.perf_counter(), file.pixels(self._task.resolution)
        truth, found = self._task.labels.index(file.label), pixels
        (name, eps), plan = attack, self._plan
        if name is not None:
            networks = self._task.with_gradients
            if self._setting.baseline == "none":
                networks = without_denoiser(networks)
            strength = Strength(eps, plan.steps, plan.rows, plan.batch_rows, self._question.seed)
            purifier = self._task.purifier if self._setting.baseline == "purified" else None
            target = Target(networks, self._setting.sigma, pixels, truth, file.index, purifier)
            found = attacked(name, target, strength)
        base = self._task.plain_label(found)
        rows = f"predict {name} {eps:g}" if name else "predict"
        predicted, votes = self._predicted(found, base, file.index, rows)
        return AttackRecord(
            file.index, file.name, truth, predicted, base, distance(pixels, found), votes,
            time.perf_counter() - began,
        )  # fmt: skip

    def _predicted(
        self, pixels: NDArray[np.uint8], base: int, index: int, domain: str
    ) -> tuple[int, dict[int, int]]:
        """PREDICT's label, -1 for an abstention, and its votes; without votes the label alone.

        The rows are the domain's own, and no attack has seen them.
        """
        from models.evaluation.tables import noise_key
        from models.rows import Rows
        from models.smoothing import votes

        sigma, asked = self._setting.sigma, self._question
        if self._setting.baseline == "purified":
            label = self._task.purified_label(pixels, asked.seed, index, domain)
            return label, {label: 1}
        if sigma is None:
            return base, {base: 1}
        key = noise_key(asked.seed, index, domain)
        networks = self._task.networks(self._setting)
        counted = votes(networks, Rows(pixels, key, 0, self._plan.n, sigma))
        blur = total_variation(_shape(self._task), sigma)
        found = predict(counted.tolist(), asked.alpha, total_variation=blur).label
        return -1 if found is None else found, nonzero(counted)


def run_attacks(
    tasks: Sequence[AttackedTask],
    runs: Sequence[Run],
    files: Sequence[LabeledFile],
    images: str,
    out: Path,
) -> dict[str, dict[str, Any]]:
    """The figures of the attacks by run, from records in `out`; those that it lacks are computed.

    `runs` are those of the tasks, in their order. Raises ValueError for networks without gradients.
    """
    kept = [
        {attack: task.outcomes(attack, images, out) for attack in task.attacks} for task in tasks
    ]
    missing = sum(file.index not in each.records for own in kept for each in own.values()
                  for file in files)  # fmt: skip
    found = {}
    with watched(missing) as watch:
        for task, run, own in zip(tasks, runs, kept, strict=True):
            for attack, outcomes in own.items():
                clean = {} if attack == CLEAN else own[CLEAN].records
                _complete(outcomes, task, attack, clean, files, watch)
            found[task.name] = _figures(run, own)
    return found


def _complete(
    outcomes: OutcomeFile[AttackRecord],
    task: AttackedTask,
    attack: Attack,
    clean: Mapping[int, AttackRecord],
    files: Sequence[LabeledFile],
    watch: Watch,
) -> None:
    """Add the records that a file lacks."""
    name, eps = attack
    shown = f"{task.name}, {name} at {eps:g}" if name else f"{task.name}, clean"
    with outcomes:
        for file in files:
            if file.index not in outcomes.records:
                outcomes.add(task.record(file, attack, clean.get(file.index)))
                watch.advance(shown)


def _figures(run: Run, kept: Mapping[Attack, OutcomeFile[AttackRecord]]) -> dict[str, Any]:
    """The figures at the clean images, and those of every attack by name and eps."""
    from models.evaluation.attacks.registry import LINF_ATTACKS

    found: dict[str, dict[str, Any]] = {}
    for (name, eps), outcomes in kept.items():
        if name is not None:
            within = None if name in LINF_ATTACKS else eps
            found.setdefault(name, {})[f"{eps:g}"] = attack_figures(run, outcomes.sorted(), within)
    return clean_figures(kept[CLEAN].sorted()) | {"by attack": found}


def _shape(task: LocalTask) -> tuple[int, int, int]:
    return 3, task.resolution, task.resolution
