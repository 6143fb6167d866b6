"""The denoisers' protocol, and plain smoothing, which denoises nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.runtime import Runtime


class Denoiser(Protocol):
    """x_hat (B,3,H,W) in [0,1] units but never clipped, sigma (B,) float64 -> x0 in [0,1]."""

    largest_sigma: float

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """One estimate per row, (B,3,H,W) float32 clamped to [0,1]; rows do not affect one another.

        Raises ValueError for a sigma above `largest_sigma`.
        """


Loader = Callable[[Path, Any, float, torch.device, torch.dtype, Runtime, Path | None], Denoiser]
"""Loads a denoiser: folder, prompt states (77,D) or None, k, device, dtype, runtime, adapter."""


class NoDenoiser:
    """Plain smoothing (Cohen et al. 2019): the noisy image itself, not clipped."""

    largest_sigma = float("inf")

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """`x_hat` unchanged; this is the one denoiser whose output may leave [0,1]."""
        return x_hat


def load_none(
    folder: Path,
    states: Tensor | None,
    k: float,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    adapter: Path | None = None,
) -> Denoiser:
    """Plain smoothing, which needs no weights; every argument is ignored."""
    return NoDenoiser()
