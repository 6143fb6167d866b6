"""Prints answers: a table of labels, radii and votes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from service.predictions.schemas import PredictResponse

MOST_LABELS = 10
"""Most labels that are named beneath the table."""


def shown(path: Path) -> str:
    """The path as text, with bytes outside UTF-8 replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def table_of(answers: Sequence[tuple[Path, PredictResponse]]) -> Table:
    """A line an image, with what the figures and labels mean beneath; needs an answer."""
    labels = answers[0][1].labels
    more = len(labels) - MOST_LABELS
    among = ", ".join(labels[:MOST_LABELS]) + (f" and {more} more" if more > 0 else "")
    table = Table("image", "label", "radius", "gray\nlevels", "p lower", "votes", caption=(
        "Certified means stable, not correct: no change of l2 norm below the radius, "
        "pixels in [0,1], changes the label. Every pixel value may change by the gray levels, of "
        "255. The radius is of the image as resized and cropped. Each label was chosen among "
        f"{len(labels)}: {escape(among)}. A picture of none of them gets one of them too."
    ))  # fmt: skip
    for path, answer in answers:
        votes = ", ".join(f"{vote.label} {vote.count}" for vote in answer.counts[:3])
        norms = answer.attack_norms
        table.add_row(
            escape(shown(path)),
            escape(answer.label) if answer.label else "(abstained)",
            "" if answer.radius is None else f"{_floor(answer.radius, 3):.3f}",
            "" if norms is None else f"{_floor(norms.linf_gray_levels, 1):.1f}",
            "" if answer.p_lower is None else f"{_floor(answer.p_lower, 3):.3f}",
            f"{votes} of {sum(vote.count for vote in answer.counts)}"
            + (f" at sigma {answer.stages[-1].sigma:g}" if answer.stages else ""),
        )
    return table


def _floor(value: float, places: int) -> float:
    """The value rounded down to some places, so that no bound is shown too large."""
    scale = 10.0**places
    return int(value * scale) / scale
