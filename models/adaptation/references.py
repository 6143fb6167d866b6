"""Reference images of a task: read, and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.adaptation.plan import MEASURED_ON, Plan
from models.classifiers.base import Classifier
from models.denoisers.base import Denoiser

EVALUATED_ROWS = 256
EVALUATED_SIGMAS = (0.25, 0.5)


@dataclass(frozen=True, slots=True)
class References:
    """Generated images (N,3,H,W) uint8 and their label indices (N,) int64."""

    images: Tensor
    labels: Tensor


def read_references(plan: Plan, folder: Path, resolution: int) -> References:
    """The plan's images, scaled to `resolution` pixels on the shorter side and center-cropped."""
    images, labels = [], []
    for label in range(len(plan.labels)):
        for shot in range(plan.shots):
            with Image.open(folder / f"{name_of_image(label, shot)}.png") as stored:
                image = _fitted(stored.convert("RGB"), resolution)
            images.append(np.asarray(image).transpose(2, 0, 1))
            labels.append(label)
    return References(torch.from_numpy(np.stack(images).copy()), torch.tensor(labels))


def _fitted(image: Image.Image, side: int) -> Image.Image:
    shorter = min(image.size)
    if shorter != side:
        scaled = (round(image.width * side / shorter), round(image.height * side / shorter))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def name_of_image(label: int, shot: int) -> str:
    """An image's file name without its suffix."""
    return f"{label}-{shot}"


@torch.no_grad()
def share_recognised(
    references: References,
    denoiser: Denoiser | None,
    classifier: Classifier,
    sigma: float,
    device: torch.device,
    moved: Callable[[int, int], None],
) -> float:
    """Share of the references that the classifier recognizes.

    It sees some noisy rows of each behind the `denoiser`, or the clean images where that is None.
    `moved` gets the number of batches done, and of all.
    """
    generator = torch.Generator().manual_seed(2**40)
    repeats = 1 if denoiser is None else max(1, EVALUATED_ROWS // len(references.labels))
    batches = torch.arange(len(references.labels)).repeat(repeats).split(32)
    right = 0
    for place, rows in enumerate(batches):
        moved(place, len(batches))
        x = references.images[rows].float() / 255
        if denoiser is not None:
            x_hat = x + sigma * torch.randn(x.shape, generator=generator)
            each = torch.full((len(x),), sigma, dtype=torch.float64)
            x = denoiser(x_hat.to(device), each)
        named = classifier(x.to(device)).argmax(1).cpu()
        right += int((named == references.labels[rows]).sum())
    return round(right / (repeats * len(references.labels)), 4)


def figures_of(
    references: References,
    zero_shot: tuple[Denoiser, Classifier],
    adapted: tuple[Denoiser, Classifier],
    device: torch.device,
    moved: Callable[[int, int], None],
) -> dict[str, Any]:
    """Shares of recognized references, under noise that no training used.

    They are of clean references, and of noisy and denoised ones, before and after the adaptation.
    The references are generated images, not photographs. `moved` gets the number of passes done,
    and of all.
    """
    passes = 1 + 2 * len(EVALUATED_SIGMAS)

    def recognised(place: int, denoiser: Denoiser | None, head: Classifier, s: float) -> float:
        def moved_on(done: int, whole: int) -> None:
            moved(place * whole + done, passes * whole)

        return share_recognised(references, denoiser, head, s, device, moved_on)

    figures: dict[str, Any] = {
        "measured_on": MEASURED_ON,
        "references": len(references.labels),
        "references recognised": recognised(0, None, zero_shot[1], 0.0),
    }
    for place, sigma in enumerate(EVALUATED_SIGMAS):
        figures[f"one noisy row of a reference recognised, sigma {sigma}"] = {
            "zero-shot": recognised(2 * place + 1, *zero_shot, sigma),
            "adapted": recognised(2 * place + 2, *adapted, sigma),
        }
    return figures
