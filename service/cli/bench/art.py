"""Certificates by IBM's Adversarial Robustness Toolbox, over the default task's networks.

`python -m service.cli.bench.art SHEET IMAGES SIGMA ROWS` certifies the first images of a sheet. It
prints a JSON list of labels (-1 on abstention), radii and seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from torch import Tensor, nn

from models.bundle import DEFAULT_TASK, read_bundle
from models.evaluation.datasets.cifar10 import evaluation_slice
from models.evaluation.row_labels import SELECTION_ROWS
from models.smoothing import SmoothedModel, load

BATCH_ROWS = 64
ALPHA = 0.001


class Networks(nn.Module):
    """Logits (B,K) of noisy rows (B,3,H,W), by the model's denoiser and classifier."""

    def __init__(self, model: SmoothedModel, sigma: float) -> None:
        super().__init__()
        self._model, self._sigma = model, sigma

    def forward(self, x_hat: Tensor) -> Tensor:
        """See the class."""
        sigma = torch.full((len(x_hat),), self._sigma, dtype=torch.float64)
        return self._model.classifier(self._model.denoiser(x_hat, sigma))


def main() -> None:
    """Certify the images and print the list."""
    sheet, count, sigma, rows = sys.argv[1:]
    data = evaluation_slice(Path(sheet))[: int(count)]
    bundle = read_bundle(DEFAULT_TASK)
    # Eager torch, all of its threads on one batch: as a user of ART has it.
    model = load(bundle, batch_rows=BATCH_ROWS, cpu_threads=0)
    smoothed = PyTorchRandomizedSmoothing(
        model=Networks(model, float(sigma)),
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, bundle.resolution, bundle.resolution),
        nb_classes=len(bundle.labels),
        device_type="gpu" if torch.cuda.is_available() else "cpu",
        sample_size=SELECTION_ROWS,
        scale=float(sigma),
        alpha=ALPHA,
    )
    found = []
    for image in data.images:
        x = image.transpose(2, 0, 1)[None].astype(np.float32) / 255
        began = time.perf_counter()
        labels, radii = smoothed.certify(x, n=int(rows), batch_size=BATCH_ROWS)
        found.append((int(labels[0]), float(radii[0]), time.perf_counter() - began))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
