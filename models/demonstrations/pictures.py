"""Computes demonstrations: what networks see of an image's rows, and an attack on the image."""

from __future__ import annotations

import hmac
import json
from base64 import b64encode
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.demonstrations.limits import ATTACKED_ROWS, STEPS
from models.evaluation.attacks.grid import distance, rounded
from models.evaluation.attacks.pgd import pgd
from models.evaluation.attacks.pipeline import smoothed
from models.noise import discrete_gaussian
from models.rows import Rows
from models.smoothing import SmoothedModel


class Demonstrated(NamedTuple):
    """Votes by class (K,) of the rows, and the pictures as a JSON document."""

    votes: NDArray[np.int64]
    document: bytes


def show_rows(model: SmoothedModel, rows: Rows) -> Demonstrated:
    """The image, and of each row the noisy image, the denoised one and the label index.

    Pictures show values outside of [0,1] as 0 or 1; networks see them as they are. Raises
    FloatingPointError for logits that are not finite.
    """
    with torch.inference_mode():
        noisy, sigmas = model.noisy([rows])
        size = model.numerics.batch_rows
        batches = zip(noisy.split(size), sigmas.split(size), strict=True)
        denoised = [model.denoiser(*batch) for batch in batches]
        logits = torch.cat([model.classifier(batch) for batch in denoised])
    labels = _labels(logits[: rows.stop - rows.start])
    samples = [
        {"noisy": _picture(before), "denoised": _picture(after), "label": label}
        for before, after, label in zip(noisy, torch.cat(denoised), labels.tolist(), strict=False)
    ]
    return _demonstrated(model, rows, labels, {"samples": samples})


def attack(model: SmoothedModel, rows: Rows, epsilon: float) -> Demonstrated:
    """The image that SmoothAdv finds at most `epsilon` (l2, [0,1] units) from the rows' image.

    Projected gradient descent lowers the mean probability, over the first ATTACKED_ROWS of the
    rows, of the label that all rows together find most probable. The networks of `model` give
    gradients.

    Raises NoGradients for networks that give none, and FloatingPointError for logits that are not
    finite.
    """
    shape, device = rows.pixels.shape, model.device
    x = torch.tensor(rows.pixels, device=device) / 255
    pipeline = smoothed(
        model,
        rows.sigma,
        shape,
        device,
        key=rows.key,
        rows=ATTACKED_ROWS,
        batch_rows=ATTACKED_ROWS,
    )
    noise = discrete_gaussian(rows.key, rows.start, rows.stop, shape, rows.sigma, device) / 255
    with torch.no_grad():
        logits = pipeline.logits(x, noise)
    labels = _labels(logits)
    label = int(logits.double().softmax(1).mean(0).argmax())
    start = hmac.digest(rows.key, b"start", "sha256")
    found = pgd(pipeline, x, label, epsilon, STEPS, start).cpu().numpy()
    image = rounded(rows.pixels, found, epsilon)
    pictures = {"image": _png(image), "l2": distance(rows.pixels, image), "steps": STEPS}
    return _demonstrated(model, rows, labels, pictures)


def _labels(logits: Tensor) -> NDArray[np.int64]:
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("the networks' logits are not finite")
    found: NDArray[np.int64] = logits.argmax(1).cpu().numpy()
    return found


def _demonstrated(
    model: SmoothedModel, rows: Rows, labels: NDArray[np.int64], pictures: dict[str, Any]
) -> Demonstrated:
    votes = np.bincount(labels, minlength=model.classes).astype(np.int64)
    return Demonstrated(votes, json.dumps({"seen": _png(rows.pixels), **pictures}).encode())


def _picture(values: Tensor) -> str:
    """An image (3,H,W) in [0,1] units as a PNG."""
    levels = (values.float() * 255).round().clamp(0, 255)
    return _png(levels.to(torch.uint8).cpu().numpy())


def _png(pixels: NDArray[np.uint8]) -> str:
    """An image (3,H,W) as the address (data:) of a PNG."""
    stream = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(stream, "PNG")
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"
