"""Noise schedules of diffusion models: the timestep for each sigma."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_ratios(alphas_cumprod: Tensor) -> Tensor:
    """sqrt((1 - alpha_bar_t) / alpha_bar_t), (T,) float64: noise strength in [-1,1] at each t."""
    alpha_bar = alphas_cumprod.double().cpu()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def timesteps(ratios: Tensor, sigma: Tensor) -> Tensor:
    """First integer t >= 1 whose ratio reaches 2 sigma (method.md 1.2), (B,) int64.

    `sigma` (B,) float64 is in [0,1] units. Raises ValueError past the schedule's end.
    """
    largest = float(ratios[-1]) / 2
    if float(sigma.max()) > largest:
        raise ValueError(f"sigma {float(sigma.max())} exceeds the denoiser's largest, {largest}")
    return torch.searchsorted(ratios[1:].contiguous(), 2 * sigma) + 1
