"""Rules of certification, applied to the labels of the same noise rows of one image.

Cohen et al. (2019) and the two-sided rule on all rows, early stopping (method.md 4b), and the
adaptive sampling of Horvath et al., "Boosting Randomized Smoothing with Variance Reduced
Classifiers" (ICLR 2022), section 5, which is here for comparison alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.certificates.anytime import Anytime, Decision, at_look, certify_anytime, look_schedule
from models.certificates.bounds import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    lowered,
    quantile_up,
)
from models.certificates.rules import certified_radius, certify

EARLY_SELECTION_ROWS = 16
"""Selection rows of a question with a target, the default of the service."""

STAGE_FACTOR, STAGES = 10, 3
"""Horvath et al. draw 10 times as many rows at each of their stages."""

STAGED_HOPELESS_LEVEL = 1e-4
"""Level at which Horvath et al. give up an image; their beta."""


@dataclass(frozen=True, slots=True)
class Question:
    """The settings that every rule shares; `target_radius` (l2, [0, 1] pixel scale) may be None."""

    sigma: float
    alpha: float
    classes: int
    total_variation: float
    target_radius: float | None = None

    def aiming_at(self, target_radius: float) -> Question:
        """The same question with this target."""
        return replace(self, target_radius=target_radius)


class Answer(NamedTuple):
    """`label` is None on abstention; `rows` are the selection and estimation rows drawn."""

    label: int | None
    radius: float
    rows: int

    def reaches(self, target_radius: float) -> bool:
        """Whether a label is certified at the target radius."""
        return self.label is not None and self.radius >= target_radius


Labels = NDArray[np.integer]
Rule = Callable[[Question, Labels, Labels], Answer]
"""The answer to a question from label indices of selection (n0,) and estimation rows (n,)."""


def cohen(question: Question, selection: Labels, estimation: Labels) -> Answer:
    """The published rule on all rows."""
    return _fixed("cohen", question, selection, estimation)


def two_sided(question: Question, selection: Labels, estimation: Labels) -> Answer:
    """The rule that bounds the runner-up too, on all rows."""
    return _fixed("two-sided", question, selection, estimation)


def staged(question: Question, selection: Labels, estimation: Labels) -> Answer:
    """Clopper-Pearson bounds at 1/100, 1/10 and all of the rows, each at alpha / 3.

    An answer ends the rows, and so does an upper bound below the target. Horvath et al. draw new
    rows for every stage. Here a stage keeps those before it, which is as sound by the union bound
    and cheaper. Raises ValueError without a target.
    """
    if question.target_radius is None:
        raise ValueError("target_radius = None: staged sampling needs a target")
    label, n = _selected(question, selection), len(estimation)
    hopeless_level = STAGED_HOPELESS_LEVEL / (STAGES - 1)
    for power in reversed(range(STAGES)):
        rows = n // STAGE_FACTOR**power
        k, drawn = int(np.count_nonzero(estimation[:rows] == label)), len(selection) + rows
        p_lower = clopper_pearson_lower(k, rows, question.alpha / STAGES)
        radius = certified_radius(lowered(p_lower, question.total_variation), question.sigma)
        if radius >= question.target_radius:
            return Answer(label, radius, drawn)
        p_upper = clopper_pearson_upper(k, rows, hopeless_level)
        if rows < n and question.sigma * quantile_up(p_upper) < question.target_radius:
            return Answer(None, 0.0, drawn)
    return Answer(label if radius > 0.0 else None, radius, drawn)


def anytime(question: Question, selection: Labels, estimation: Labels) -> Answer:
    """Early stopping as the service does it; with a target, 16 selection rows are read."""
    n, target = len(estimation), question.target_radius
    if target is not None:
        selection = selection[:EARLY_SELECTION_ROWS]
    schedule = look_schedule(n, question.sigma, question.alpha, target, question.total_variation)
    asked = Anytime(
        question.sigma,
        question.alpha,
        len(selection),
        n,
        target,
        schedule,
        question.total_variation,
    )
    chosen, looks = _votes(question, selection), []
    for rows in schedule:
        looks.append(_votes(question, estimation[:rows]))
        if at_look(asked, chosen, looks) is not Decision.CONTINUE:
            break
    proven = certify_anytime(asked, chosen, looks)
    return Answer(proven.label, proven.radius or 0.0, len(selection) + rows)


RULES: dict[str, Rule] = {
    "cohen": cohen,
    "two-sided": two_sided,
    "staged": staged,
    "anytime": anytime,
}


def _fixed(method: str, question: Question, selection: Labels, estimation: Labels) -> Answer:
    proven = certify(
        _votes(question, selection),
        _votes(question, estimation),
        question.sigma,
        question.alpha,
        method=method,
        total_variation=question.total_variation,
    )
    return Answer(proven.label, proven.radius or 0.0, len(selection) + len(estimation))


def _selected(question: Question, selection: Labels) -> int:
    return int(_votes(question, selection).argmax())


def _votes(question: Question, labels: Labels) -> NDArray[np.int64]:
    return np.bincount(labels, minlength=question.classes).astype(np.int64)
