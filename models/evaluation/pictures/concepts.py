"""Picture of an image before and after an attack, with its nearest concepts (paper, figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.evaluation.pictures.curves import saved

if TYPE_CHECKING:
    from models.evaluation.concepts import Reading

_COLORS = ("#4477aa", "#cc6677")
_GRAY = 127
"""Gray levels of no change in a picture of a difference."""


def draw_concepts(
    images: Mapping[str, NDArray[np.uint8]],
    readings: Mapping[str, Mapping[str, Reading]],
    concepts: Sequence[str],
    shown: Mapping[str, Sequence[int]],
    path: Path,
) -> list[Path]:
    """Draw two images (3,R,R), by name, and their difference, above the shares of concepts.

    `readings` are by way (undefended, defended), then by image. `shown` has the indices of each
    way's concepts. The files are `path` with `.png` and with `.svg`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.2])
    above, below = halves
    change, gain = difference(*images.values())
    pictures = {**images, f"difference, enlarged {gain} times": change}
    for axes, (title, pixels) in zip(above.subplots(1, 3), pictures.items(), strict=True):
        axes.imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
    for axes, (way, by_image) in zip(
        below.subplots(1, len(readings), sharex=True), readings.items(), strict=True
    ):
        places = np.arange(len(shown[way]))
        for shift, color, (name, reading) in zip(
            (-0.2, 0.2), _COLORS, by_image.items(), strict=True
        ):
            shares = 100 * reading.shares[shown[way]]
            axes.barh(places + shift, shares, 0.4, color=color, label=name)
        words = [concepts[index] for index in shown[way]]
        axes.set_yticks(places, words, fontsize=9, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("share of the concepts, %")
        axes.set_title(way, fontsize=10)
    axes.legend(fontsize=9)
    return saved(figure, path)


def difference(
    original: NDArray[np.uint8], attacked: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], int]:
    """The change as a picture around medium gray, enlarged as far as it fits, and by how much."""
    change = attacked.astype(np.int64) - original
    gain = max(1, _GRAY // max(1, int(np.abs(change).max())))
    return np.clip(_GRAY + gain * change, 0, 255).astype(np.uint8), gain
