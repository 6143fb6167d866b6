"""Figures that tables have in their cells, each from one log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.evaluation.paper.sources import COHEN, Log
from models.evaluation.scores import average_certified_radius, wilson_interval


class Figure(NamedTuple):
    """A value, the ends of its interval if it has one, and the images that it is of, if known.

    Its `kind` is "share" in [0, 1], with a Wilson interval; "radius", without an interval; or
    "seconds" an image, with one standard deviation on both sides.
    """

    value: float
    low: float | None
    high: float | None
    images: int | None
    kind: str

    def text(self) -> str:
        """The figure as tables print it: shares in percent to one decimal, radii to three."""
        if self.kind == "share":
            return f"{100 * self.value:.1f}{self._interval()}"
        if self.kind == "radius":
            return f"{self.value:.3f}"
        return f"{self.value:.2f} ± {(self.high or 0.0) - self.value:.2f}"

    def _interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f" [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True, slots=True)
class Measure:
    """A log's figure by name, as `certified 0.25`; `by_rule` ones depend on the radii's rule."""

    figure: Callable[[Log, float, str], Figure | None]
    by_rule: bool = False


def measured(name: str, log: Log | None, rule: str = COHEN) -> Figure | None:
    """The figure of a log by a rule; None without the log, or where it lacks what is needed.

    `name` is one of MEASURES; `certified` has a radius after it. Raises ValueError for another.
    """
    word, _, argument = name.partition(" ")
    if word not in MEASURES:
        raise ValueError(f"figure = {name!r}: must be one of {', '.join(MEASURES)}")
    return None if log is None else MEASURES[word].figure(log, float(argument or 0), rule)


def depends_on_rule(name: str) -> bool:
    """Whether the figure is of certified radii."""
    return MEASURES[name.partition(" ")[0]].by_rule


def average(figures: Sequence[Figure | None]) -> Figure | None:
    """The mean of shares over data sets, each counting alike; None where one is missing."""
    known = [figure for figure in figures if figure is not None]
    if not known or len(known) < len(figures):
        return None
    value = float(np.mean([figure.value for figure in known]))
    return Figure(value, None, None, sum(figure.images or 0 for figure in known), "share")


def _certified(log: Log, epsilon: float, rule: str) -> Figure | None:
    if rule not in log.certified:
        return None
    records = log.certified[rule].records
    right = sum(record.correct and record.radius >= epsilon for record in records)
    return _share(right, len(records))


def _acr(log: Log, _: float, rule: str) -> Figure | None:
    if rule not in log.certified:
        return None
    records = log.certified[rule].records
    radii, right = zip(*((record.radius, record.correct) for record in records), strict=True)
    return Figure(average_certified_radius(radii, right), None, None, len(records), "radius")


def _correct(log: Log, _: float, __: str) -> Figure:
    return _share(sum(answer.correct for answer in log.answers), len(log.answers))


def _empirical(log: Log, _: float, __: str) -> Figure:
    """The paper's empirical clean accuracy: on abstention the label without noise counts."""
    labels = [
        answer.base if answer.predict < 0 and answer.base is not None else answer.predict
        for answer in log.answers
    ]
    right = sum(label == answer.truth for label, answer in zip(labels, log.answers, strict=True))
    return _share(right, len(labels))


def _seconds(log: Log, _: float, __: str) -> Figure | None:
    """Seconds an image; the first is left out, as its networks warm up (appendix C.2)."""
    seconds = [answer.seconds for answer in log.answers[1:]]
    if not seconds:
        return None
    mean, spread = float(np.mean(seconds)), float(np.std(seconds))
    return Figure(mean, mean - spread, mean + spread, len(seconds), "seconds")


def _share(right: int, images: int) -> Figure:
    low, high = wilson_interval(right, images)
    return Figure(right / images, low, high, images, "share")


MEASURES: dict[str, Measure] = {
    "certified": Measure(_certified, by_rule=True),
    "ACR": Measure(_acr, by_rule=True),
    "correct": Measure(_correct),
    "empirical": Measure(_empirical),
    "seconds": Measure(_seconds),
}
