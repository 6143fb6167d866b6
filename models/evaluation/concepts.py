"""Similarity of images to concepts, words of any kind, behind a task's CLIP head (paper, C.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.bundle import Bundle
from models.classifiers.registry import DESCRIPTIONS
from models.files import written_whole
from models.noise import discrete_gaussian
from models.runtime import Torch
from models.smoothing import SmoothedModel, load

BATCH_ROWS = 8
WAYS = ("undefended", "defended")
"""The fields of a reading."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One image's shares of the concepts (C,), which add up to 1.

    `undefended` is the head's own: the softmax of its similarities, at the head's scale.
    `defended` is the mean over denoised noisy rows.
    """

    undefended: NDArray[np.float64]
    defended: NDArray[np.float64]


class ConceptHead:
    """A task's networks with `concepts` in the place of its labels, in float32.

    `prompts` are the words in the template of those concepts that have others than their own.
    Raises ValueError for a classifier that does not take words, for fewer than two concepts and for
    one that occurs twice; BundleError as `models.smoothing.load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        concepts: Sequence[str],
        prompts: Mapping[str, str],
        models_dir: Path | None = None,
    ) -> None:
        if len(concepts) < 2:
            raise ValueError(f"concepts: there are {len(concepts)}; the fewest are 2")
        if twice := next((word for word in concepts if list(concepts).count(word) > 1), None):
            raise ValueError(f"concepts: {twice!r} occurs twice")
        kind = bundle.classifier.kind
        with bundle.classifier.opened(models_dir) as folder:
            takes_words = kind in DESCRIPTIONS and DESCRIPTIONS[kind](folder).takes_words
        if not takes_words:
            raise ValueError(
                f"task {bundle.id}: its classifier of kind {kind} has fixed labels; concepts need "
                "a CLIP or SigLIP"
            )
        words = replace(bundle, labels=tuple(concepts), prompts=prompts)
        self.concepts = words.labels
        self._model: SmoothedModel = load(
            words, dtype=torch.float32, cpu_threads=0, runtime=Torch(), models_dir=models_dir
        )

    @torch.inference_mode()
    def read(self, pixels: NDArray[np.uint8], sigma: float, rows: int, key: bytes) -> Reading:
        """The shares of an image (3,R,R); `rows` noise rows of the key (32 bytes) defend it."""
        x = torch.tensor(pixels, device=self._model.device)[None] / 255
        shares = []
        for start in range(0, rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, rows)
            noise = discrete_gaussian(key, start, stop, pixels.shape, sigma, x.device) / 255
            sigmas = torch.full((stop - start,), sigma, dtype=torch.float64)
            denoised = self._model.denoiser(x + noise.to(x.dtype), sigmas)
            shares.append(self._shares(denoised))
        return Reading(self._shares(x)[0], np.concatenate(shares).mean(0))

    def _shares(self, x: torch.Tensor) -> NDArray[np.float64]:
        shares: NDArray[np.float64] = self._model.classifier(x).double().softmax(1).cpu().numpy()
        return shares


def ranked(
    concepts: Sequence[str], shares: NDArray[np.float64], count: int
) -> list[tuple[str, float]]:
    """The `count` concepts with the largest shares, descending."""
    largest = np.argsort(-shares, kind="stable")[:count]
    return [(concepts[index], float(shares[index])) for index in largest]


def draw(
    pictures: Mapping[str, NDArray[np.uint8]],
    readings: Mapping[str, Reading],
    concepts: Sequence[str],
    count: int,
    folder: Path,
) -> None:
    """Draw concepts.png and concepts.svg: each picture (3,R,R), and its top concepts both ways."""
    figure = Figure(figsize=(10.5, 2.3 * len(pictures)), layout="constrained")
    grid: Any = figure.subplots(len(pictures), 3, squeeze=False, width_ratios=[1, 1.6, 1.6])
    named = {
        (name, way): ranked(concepts, getattr(reading, way), count)
        for name, reading in readings.items()
        for way in WAYS
    }
    largest = max(share for each in named.values() for _, share in each)
    for axes, (name, pixels) in zip(grid, pictures.items(), strict=True):
        axes[0].imshow(pixels.transpose(1, 2, 0), interpolation="nearest")
        axes[0].set_axis_off()
        axes[0].set_title(name, fontsize=9)
        for bars, way in zip(axes[1:], WAYS, strict=True):
            words, shares = zip(*named[name, way], strict=True)
            bars.barh(range(len(words)), shares, color="#4477aa")
            bars.set_yticks(range(len(words)), words, fontsize=8)
            bars.invert_yaxis()
            bars.set_xlim(0, 1.05 * largest)
            bars.tick_params("x", labelsize=7)
            bars.set_title(way, fontsize=9)
    for suffix in ("png", "svg"):
        with written_whole(folder / f"concepts.{suffix}") as partial:
            figure.savefig(partial, dpi=130, format=suffix)
            partial.chmod(0o644)
