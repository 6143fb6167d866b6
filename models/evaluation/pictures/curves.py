"""Certified-accuracy curves of evaluations, and their figures over a setting, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.evaluation.results import Run, curve
from models.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_LINES = ("-", "--", ":", "-.")


def draw(runs: Sequence[Run], path: Path) -> list[Path]:
    """Draw each run's certified accuracy by l2 radius, at `path` with `.png` and with `.svg`.

    A run without noise is one point, at radius 0. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, run in enumerate(runs):
        if run.certifies:
            radii, shares = curve(run)
            axes.step(
                radii + radii[-1:],
                [*shares, 0.0],
                where="pre",
                label=run.name,
                linestyle=_LINES[place % len(_LINES)],
            )
        else:
            right = sum(record.correct for record in run.records) / len(run.records)
            axes.plot([0.0], [right], marker="o", linestyle="none", label=run.name, clip_on=False)
    axes.set_xlabel("l2 radius, pixels in [0, 1]")
    axes.set_ylabel("certified accuracy")
    axes.set_xlim(left=0.0)
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return saved(figure, path)


def draw_panels(
    x: Sequence[float],
    series: Mapping[str, Mapping[str, Sequence[float | None]]],
    label: str,
    path: Path,
    scale: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Draw a panel for every quantity of `series` over x, with a line for every name.

    None is a missing point. `scale` are the arguments of matplotlib's `set_xscale`. Files and
    errors as in `draw`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(series), 3.2), layout="constrained")
    panels: Any = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, (quantity, named) in zip(panels, series.items(), strict=True):
        for place, (name, values) in enumerate(named.items()):
            points = [point for point in zip(x, values, strict=True) if point[1] is not None]
            if points:
                style = _LINES[place % len(_LINES)]
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
        axes.set_xscale(**(scale or {"value": "linear"}))
        axes.set_xlabel(label)
        axes.set_title(quantity, fontsize=10)
        axes.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        panels[0].legend(handles, names, fontsize=8)
    return saved(figure, path)


def saved(figure: Figure, path: Path) -> list[Path]:
    """The files of a figure, written whole, and the same bytes each time."""
    from matplotlib import rc_context

    files = [path.with_suffix(suffix) for suffix in SUFFIXES]
    with rc_context({"svg.hashsalt": "vouchsafe"}):
        for file in files:
            with written_whole(file) as partial:
                figure.savefig(
                    partial, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else {}
                )
                partial.chmod(0o644)
    return files
