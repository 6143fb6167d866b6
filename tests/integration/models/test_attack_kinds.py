"""Gradients through every kind of network that gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.classifiers.registry import CLASSIFIERS
from models.denoisers.registry import DENOISERS
from models.evaluation.attacks.pipeline import smoothed
from models.kinds import TUNABLE_KINDS
from models.runtime import Torch, numerics_of
from models.smoothing import SmoothedModel
from tests.support import miniatures

CPU = torch.device("cpu")
TEMPLATE = "This is a photo of a {}."
SHAPE = (3, 32, 32)


@pytest.mark.parametrize(
    ("denoiser", "classifier"),
    [*((kind, "timm") for kind in DENOISERS), *(("none", kind) for kind in TUNABLE_KINDS)],
)
def test_the_loss_rises_by_the_gradient(denoiser: str, classifier: str, tmp_path: Path) -> None:
    """As loaded for serving, a small step along the gradient gains the step times its length."""
    denoiser_folder = miniatures.DENOISER_FOLDERS[denoiser](tmp_path / "denoiser")
    classifier_folder = miniatures.CLASSIFIER_FOLDERS[classifier](tmp_path / "classifier")
    loaded = (CPU, torch.float32, Torch())
    model = SmoothedModel(
        DENOISERS[denoiser](denoiser_folder, miniatures.states(), 1.8, *loaded),
        CLASSIFIERS[classifier](classifier_folder, miniatures.LABELS, TEMPLATE, *loaded),
        numerics_of(CPU, torch.float32, 4),
        CPU,
    )
    pipeline = smoothed(model, 0.25, SHAPE, CPU, key=bytes(32), rows=3, batch_rows=2)
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))
    _, gradient = pipeline.gradient(x, 1)
    step = 0.003 * gradient / gradient.norm()
    gain = pipeline.loss(x + step, 1) - pipeline.loss(x - step, 1)
    assert gain == pytest.approx(2 * 0.003 * float(gradient.norm()), rel=0.1)
    assert gain > 0
