"""Certificates for arrays of images and a torch module, without a service."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("two-sided", "cohen")


def certify(
    model: Any,
    images: ArrayLike,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    method: str = "two-sided",
    batch_rows: int = 64,
    seed: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Certified labels (N,) int64 and l2 radii (N,) float64 of the smoothed `model`.

    The label is -1 and the radius 0.0 where the smoothed classifier abstains. With probability at
    least 1 - alpha for each image, no change of its pixels shorter than the radius, in [0,1] units,
    changes the label. Noise and statistics are those of the service.

    `model` is a torch module in evaluation mode, x (B,3,H,W) float32 -> logits (B,K). x is the
    image in [0,1] plus noise and is not clipped; denoising and normalization belong into the
    module. Its rows must not affect one another. `images` (N,3,H,W) is uint8, as the noise lives on
    the grid of 1/255. `sigma` is in [0,1] units. `n0` noise samples (rows) choose the label, and
    `n` rows bound its probability. `method` is "two-sided" or "cohen". The module always gets
    `batch_rows` rows, on the device of its parameters. The noise is secret and new each time;
    with a `seed`, which is for repeating experiments, it is not.

    Raises ImportError without torch, ValueError for arguments outside their limits or a module in
    training mode, TypeError for images that are not uint8, and FloatingPointError for logits that
    are not finite.
    """
    try:
        import torch

        from models.certificates import rules
        from models.denoisers.base import NoDenoiser
        from models.noise import total_variation
        from models.rows import Rows
        from models.runtime import numerics_of
        from models.smoothing import SmoothedModel, votes
    except ImportError as error:
        raise ImportError(
            f"certify needs torch ({error}): pip install '.[torch]' in the checkout"
        ) from error

    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    if batch_rows < 1:
        raise ValueError(f"batch_rows = {batch_rows}: must be at least 1")
    pixels = _checked_images(images)
    blur = total_variation(sigma, pixels.shape[1:])
    rules.check_certify(n0, n, sigma, alpha, method)
    if getattr(model, "training", False):
        raise ValueError("model is in training mode: call model.eval() first")

    like = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    device = torch.device("cpu") if like is None else like.device
    with torch.inference_mode():
        classes = _classes(model(torch.zeros(batch_rows, *pixels.shape[1:], device=device)))
    numerics = numerics_of(device, torch.float32, batch_rows)
    smoothed = SmoothedModel(NoDenoiser(), _Module(model, classes), numerics, device)

    labels = np.full(len(pixels), -1, np.int64)
    radii = np.zeros(len(pixels))
    for index, image in enumerate(pixels):
        selection, estimation = (
            votes(smoothed, Rows(image, _key(seed, index, domain), 0, rows, sigma)).tolist()
            for domain, rows in (("selection", n0), ("estimation", n))
        )
        proven = rules.certify(
            selection, estimation, sigma, alpha, method=method, total_variation=blur
        )
        if proven.label is not None:
            labels[index], radii[index] = proven.label, proven.radius or 0.0
    return labels, radii


class _Module:
    """The caller's module as a classifier with labels by number."""

    def __init__(self, module: Any, classes: int) -> None:
        self._module = module
        self.labels = tuple(map(str, range(classes)))

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B,K) float32."""
        logits: Tensor = self._module(x)
        return logits.float()


def _checked_images(images: ArrayLike) -> NDArray[np.uint8]:
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8:
        raise TypeError(f"images are {pixels.dtype}: must be uint8, pixels from 0 to 255")
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"images have the shape {pixels.shape}: must be (N,3,H,W)")
    return np.ascontiguousarray(pixels)


def _classes(logits: Tensor) -> int:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"model returns {tuple(logits.shape)}: must be (B,K) with K >= 2")
    return logits.shape[1]


def _key(seed: int | None, index: int, domain: str) -> bytes:
    """The key of one image's noise, 32 bytes; unpredictable without a seed."""
    if seed is None:
        return secrets.token_bytes(32)
    return hashlib.sha256(f"certify/{seed}/{index}/{domain}".encode()).digest()
