"""Labels of single noise rows, in a file, so that rules can be applied to them again and again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.evaluation.datasets.cifar10 import LabelledImages
from models.evaluation.tables import noise_key
from models.rows import Rows
from models.smoothing import SmoothedModel

SELECTION_ROWS = 100
"""Selection rows of every image, the default of CERTIFY."""


@dataclass(frozen=True, slots=True)
class RowLabels:
    """The label index of every noise row of M images, in row order.

    `selection` is (M, SELECTION_ROWS) and `estimation` (M, rows), int16. `digest` is the served
    bundle's.
    """

    selection: NDArray[np.int16]
    estimation: NDArray[np.int16]
    sigma: float
    digest: str

    def __len__(self) -> int:
        return len(self.estimation)


def label_rows(
    model: SmoothedModel, data: LabelledImages, sigma: float, rows: int, path: Path
) -> Iterator[RowLabels]:
    """All labels so far, after each image; the last has every image of `data`.

    The file `path` (.npz) is written after each image. Images and rows that it has already are
    read, not computed. Noise keys are those of `vouchsafe evaluate` with seed 0.

    Raises ValueError for a file of another sigma or digest, or with fewer rows.
    """
    labels = _read(path, rows) if path.exists() else _none(model, sigma, rows)
    for name, found, wanted in (
        ("sigma", labels.sigma, sigma),
        ("digest", labels.digest, model.digest),
    ):
        if found != wanted:
            raise ValueError(f"{path} has {name} = {found}: must be {wanted}")
    labels = _first(labels, len(data))
    if len(labels) == len(data):
        yield labels
    for index in range(len(labels), len(data)):
        pixels = np.ascontiguousarray(data.images[index].transpose(2, 0, 1))
        selection, estimation = (
            _labels(model, Rows(pixels, noise_key(0, index, domain), 0, count, sigma))
            for domain, count in (("selection", SELECTION_ROWS), ("estimation", rows))
        )
        labels = RowLabels(
            np.vstack([labels.selection, selection]),
            np.vstack([labels.estimation, estimation]),
            sigma,
            model.digest,
        )
        _write(path, labels)
        yield labels


def _labels(model: SmoothedModel, rows: Rows) -> NDArray[np.int16]:
    batches = (
        Rows(rows.pixels, rows.key, start, min(start + model.batch_rows, rows.stop), rows.sigma)
        for start in range(0, rows.stop, model.batch_rows)
    )
    return np.concatenate([model.labels([batch]) for batch in batches]).astype(np.int16)


def _none(model: SmoothedModel, sigma: float, rows: int) -> RowLabels:
    selection, estimation = (np.zeros((0, count), np.int16) for count in (SELECTION_ROWS, rows))
    return RowLabels(selection, estimation, sigma, model.digest)


def _first(labels: RowLabels, images: int) -> RowLabels:
    return RowLabels(
        labels.selection[:images], labels.estimation[:images], labels.sigma, labels.digest
    )


def _read(path: Path, rows: int) -> RowLabels:
    with np.load(path) as stored:
        selection, estimation = (stored[name] for name in ("selection", "estimation"))
        if estimation.shape[1] < rows:
            raise ValueError(f"{path} has {estimation.shape[1]} rows an image: must be {rows}")
        return RowLabels(
            selection.astype(np.int16),
            estimation[:, :rows].astype(np.int16),
            float(stored["sigma"]),
            str(stored["digest"]),
        )


def _write(path: Path, labels: RowLabels) -> None:
    """Write beside the file and rename, so that an interrupted run leaves a whole file."""
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        selection=labels.selection,
        estimation=labels.estimation,
        sigma=labels.sigma,
        digest=labels.digest,
    )
    os.replace(partial, path)
