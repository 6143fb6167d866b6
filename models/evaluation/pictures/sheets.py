"""Pictures of a task's effect on images, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.certificates.rules import Certificate
from models.rows import Rows
from models.smoothing import SmoothedModel

Picture = NDArray[np.floating[Any]]
"""(H,W,3) in [0,1]."""
SIDE = 1.1
"""Inches of a picture's side."""
VOTES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Shown:
    """One image on a contact sheet: the input, the network's input, and the result."""

    truth: str
    image: Picture
    noisy: Picture
    denoised: Picture
    counts: dict[str, int]
    label: str | None
    certificate: Certificate


def noisy_and_denoised(model: SmoothedModel, rows: Rows) -> tuple[Picture, Picture]:
    """The first of the rows before and after the denoiser; the noisy one is clipped for display."""
    with torch.inference_mode():
        x_hat, sigma = model.noisy([rows])
        pair = torch.stack([x_hat[0], model.denoiser(x_hat, sigma)[0]]).clamp(0, 1)
    noisy, denoised = pair.permute(0, 2, 3, 1).float().cpu().numpy()
    return noisy, denoised


def contact_sheet(shown: Sequence[Shown], title: str, path: Path, columns: int = 2) -> None:
    """Draw one line per image: itself, a noisy row, that row denoised, votes, label and radius."""
    lines = ceil(len(shown) / columns)
    figure = Figure(figsize=(columns * 6.2 * SIDE, lines * 1.3 * SIDE + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid: Any = figure.subplots(
        lines, columns * 4, squeeze=False, width_ratios=[1, 1, 1, 2.6] * columns
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for place, one in enumerate(shown):
        line, block = place % lines, place // lines
        cells = grid[line, 4 * block : 4 * block + 4]
        for axes, picture in zip(cells, (one.image, one.noisy, one.denoised), strict=False):
            axes.imshow(picture, interpolation="nearest")
        if line == 0:
            for axes, word in zip(cells, ("image", "noisy", "denoised"), strict=False):
                axes.set_title(word, fontsize=8)
        _votes(cells[3], one)
    figure.savefig(path, dpi=110)


def _votes(axes: Axes, one: Shown) -> None:
    total = sum(one.counts.values())
    largest = sorted(one.counts.items(), key=lambda item: -item[1])[:VOTES_SHOWN]
    for place, (label, count) in enumerate(largest):
        axes.barh(-place, count / total, color="#4477aa" if label == one.label else "#bbbbbb")
        axes.text(0.02, -place, f"{label}  {count}", va="center", fontsize=7)
    certificate = one.certificate
    if certificate.abstained or certificate.radius is None:
        said, colour = "abstains", "#777777"
    else:
        radius = floor(certificate.radius * 1000) / 1000
        said = f"{one.label}, radius {radius:.3f}"
        colour = "#227733" if one.label == one.truth else "#aa3333"
    axes.text(0.0, 1.0, said, va="center", fontsize=9, color=colour, weight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(-VOTES_SHOWN + 0.4, 1.6)


def picture_grid(
    pictures: Sequence[Sequence[Picture]], lines: Sequence[str], columns: Sequence[str], path: Path
) -> None:
    """Draw pictures by line and column, with the names of both."""
    size = (len(columns) * SIDE + 0.7, len(lines) * SIDE + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid: Any = figure.subplots(len(lines), len(columns), squeeze=False)
    for y, line in enumerate(lines):
        for x, column in enumerate(columns):
            axes = grid[y, x]
            axes.imshow(pictures[y][x], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if y == 0:
                axes.set_title(column, fontsize=8)
            if x == 0:
                axes.set_ylabel(line, fontsize=8)
    figure.savefig(path, dpi=110)
