"""Figures, intervals and comparisons of an evaluation, from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.certificates.rules import certify
from models.evaluation.records import Record
from models.evaluation.scores import EPSILONS, bootstrap, paired_bootstrap, wilson_interval

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of p_A, the share of an image's estimation rows with the most frequent label."""
RULES = ("two-sided", "cohen")
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """The records of one setting, by image; `certifies` is False where there is no noise."""

    name: str
    settings: Mapping[str, Any]
    records: Sequence[Record]
    certifies: bool = True


def figures(run: Run) -> dict[str, Any]:
    """What a run measured, as shares with 95 % intervals; needs at least one record.

    `clean` counts the label with most votes, certified or not. `certified`, by epsilon (l2, [0,1]
    pixel units), counts an abstention as wrong. `ACR` is the mean radius of all images, 0 where the
    label is wrong or missing.
    """
    records = run.records
    found: dict[str, Any] = {
        "settings": dict(run.settings),
        "bundles": sorted({record.bundle for record in records}),
        "images": len(records),
        "clean": share(_clean(records)),
    }
    if not run.certifies:
        return found
    votes = [record.estimation for record in records]
    sizes = np.array([sum(each.values()) for each in votes])
    top = np.array([max(each.values()) for each in votes]) / sizes
    true = [each.get(record.truth, 0) for each, record in zip(votes, records, strict=True)]
    return found | {
        "certified": {f"{e:g}": share(certified_at(records, e)) for e in EPSILONS},
        "ACR": _interval(bootstrap(_scores(records))),
        "abstentions": share(np.array([record.predict < 0 for record in records])),
        "p_A": {f"{q:.0%}": round(float(np.quantile(top, q)), DIGITS) for q in QUANTILES},
        "one noisy row": round(float(np.mean(np.array(true) / sizes)), DIGITS),
        "rows": int(sizes.sum()),
        "seconds": round(sum(record.seconds for record in records), 1),
    }


def compared(before: Run, after: Run) -> dict[str, Any]:
    """Differences of the same images' figures, after minus before, with paired 95 % intervals."""
    measures = {"clean": _clean}
    if before.certifies and after.certifies:
        measures |= {f"certified at {e:g}": _at(e) for e in EPSILONS} | {"ACR": _scores}
    return {
        "before": before.name,
        "after": after.name,
        **{
            name: _interval(
                paired_bootstrap(
                    measure(before.records).astype(float), measure(after.records).astype(float)
                )
            )
            for name, measure in measures.items()
        },
    }


def by_rule(run: Run, rule: str, total_variation: float) -> Run | None:
    """The run with its votes certified by another rule; None without the selection votes."""
    if not run.certifies or any(record.selection is None for record in run.records):
        return None
    settings = dict(run.settings)
    records = [
        certified(record, settings["classes"], settings["sigma"], settings["alpha"], rule,
                  total_variation)
        for record in run.records
    ]  # fmt: skip
    return Run(run.name, settings | {"method": rule}, records)


def certified(
    record: Record, classes: int, sigma: float, alpha: float, rule: str, total_variation: float
) -> Record:
    """The record with label and radius by `rule`, "two-sided" or "cohen", from its votes."""
    selection, estimation = (
        [votes.get(label, 0) for label in range(classes)]
        for votes in (record.selection or {}, record.estimation)
    )
    proven = certify(
        selection, estimation, sigma, alpha, method=rule, total_variation=total_variation
    )
    predict = -1 if proven.label is None else proven.label
    return Record(
        record.index, record.name, record.truth, predict, proven.radius or 0.0,
        record.estimation, record.selection, record.seconds, record.bundle,
    )  # fmt: skip


def curve(run: Run) -> tuple[list[float], list[float]]:
    """Radii in ascending order, from 0, and the certified accuracy from the one before on."""
    radii = np.sort([record.radius for record in run.records if record.correct])
    points = [0.0, *radii.tolist()]
    shares = [(len(radii) - place) / len(run.records) for place in (0, *range(len(radii)))]
    return points, shares


def _clean(records: Sequence[Record]) -> NDArray[np.bool_]:
    return np.array([record.majority == record.truth for record in records])


def certified_at(records: Sequence[Record], epsilon: float) -> NDArray[np.bool_]:
    """Whether each image's label is right, with a radius of at least epsilon (N,)."""
    return np.array([record.correct and record.radius >= epsilon for record in records])


def _at(epsilon: float) -> Any:
    return lambda records: certified_at(records, epsilon)


def _scores(records: Sequence[Record]) -> NDArray[np.float64]:
    return np.array([record.radius if record.correct else 0.0 for record in records])


def share(right: NDArray[np.bool_]) -> dict[str, float]:
    """The count and share of true values (N,), with the share's 95 % Wilson interval."""
    low, high = wilson_interval(int(right.sum()), len(right))
    return {"count": int(right.sum()), **_interval((float(right.mean()), low, high))}


def _interval(values: tuple[float, float, float]) -> dict[str, float]:
    named = zip(("value", "low", "high"), values, strict=True)
    return {name: round(value, DIGITS) for name, value in named}
