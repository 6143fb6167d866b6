"""A task's networks as a purifier."""

from __future__ import annotations

from pathlib import Path

import torch

from models.bundle import Bundle
from models.purification.auxiliary import read_auxiliary
from models.purification.purifier import Purifier, Settings
from models.purification.reverse import schedule_of
from models.smoothing import best_device, load


def load_purifier(
    bundle: Bundle,
    settings: Settings,
    auxiliary: Path | None = None,
    *,
    device: torch.device | None = None,
    models_dir: Path | None = None,
) -> Purifier:
    """A task's denoiser and classifier as a purifier, in float32, as gradients want.

    `auxiliary` is the folder of a trained auxiliary network. Raises ValueError for a denoiser
    without a schedule and as `Purifier`, BundleError for networks as `models.smoothing.load`.
    """
    device = device or best_device()
    model = load(bundle, device=device, dtype=torch.float32, cpu_threads=0, models_dir=models_dir)
    network = None
    if auxiliary is not None:
        network = read_auxiliary(auxiliary, len(bundle.labels), device)
    schedule = schedule_of(model.denoiser)
    return Purifier(model.denoiser, model.classifier, schedule, settings, network)
