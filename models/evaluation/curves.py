"""The certified-accuracy curve of an evaluation, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.evaluation.results import Run, curve

SUFFIXES = (".png", ".svg")
_LINES = ("-", "--", ":", "-.")


def draw(runs: Sequence[Run], path: Path) -> list[Path]:
    """Draw each run's certified accuracy by l2 radius, at `path` with `.png` and with `.svg`.

    A run without noise is one point, at radius 0. Raises ImportError without matplotlib.
    """
    from matplotlib import rc_context
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
    files = [path.with_suffix(suffix) for suffix in SUFFIXES]
    with rc_context({"svg.hashsalt": "vouchsafe"}):
        for file in files:
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else {})
    return files
