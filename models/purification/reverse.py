"""A diffusion model's schedule as purification uses it, and the posterior of one reverse step.

Images x_t are in [-1,1] units, scaled by sqrt(alpha_bar_t) as in DDPM (Ho et al. 2020, arXiv
2006.11239). t runs from 1 to t*; alpha_bar_0 is 1, so that the last step gives a clean image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.denoisers.schedule import noise_ratios

CIFAR_T_STAR = 70
"""t* on CIFAR-10 (method.md 7), of the 1,000 steps of DDPM's linear schedule."""


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, x_0) = N(of_x_0 x_0 + of_x_t x_t, variance), DDPM Eq. 6 and 7."""

    of_x_0: float
    of_x_t: float
    variance: float


class Schedule:
    """alpha_bar_t and what follows from it, from the `alphas_cumprod` (T,) of a scheduler.

    The entry of t = 0 does not matter: the denoisers have no timestep below 1.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        ratios = noise_ratios(alphas_cumprod)
        self._ratios = ratios[ratios.isfinite()]  # A zero terminal SNR has no ratio.
        self._alpha_bar = alphas_cumprod.double().tolist()
        self._alpha_bar[0] = 1.0
        self.largest_t = len(self._ratios) - 1

    def alpha_bar(self, t: int) -> float:
        """alpha_bar_t; 1 at t = 0."""
        return float(self._alpha_bar[t])

    def ratio(self, t: int) -> float:
        """sqrt((1 - alpha_bar_t) / alpha_bar_t), t from 1: noise over signal in [-1,1] units."""
        return float(self._ratios[t])

    def t_star(self, given: int | None) -> int:
        """The given t*, or the last t that is no noisier than t = 70 of DDPM on CIFAR-10.

        Raises ValueError for a t* that the schedule does not have.
        """
        if given is None:
            return self.reached_by(cifar_ratio())
        if not 1 <= given <= self.largest_t:
            raise ValueError(f"t_star is {given}; this schedule has 1 to {self.largest_t}")
        return given

    def reached_by(self, ratio: float) -> int:
        """The last t whose noise ratio is at most `ratio`, 1 at least."""
        return max(1, int((self._ratios[1:] <= ratio).sum()))

    def posterior(self, t: int) -> Posterior:
        """The posterior of step t to t - 1, t from 1."""
        now, before = self.alpha_bar(t), self.alpha_bar(t - 1)
        alpha = now / before
        return Posterior(
            math.sqrt(before) * (1 - alpha) / (1 - now),
            math.sqrt(alpha) * (1 - before) / (1 - now),
            (1 - before) / (1 - now) * (1 - alpha),
        )


def cifar_schedule() -> Schedule:
    """DDPM's linear schedule, on which CIFAR-10's t* is stated."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler()
    return Schedule(scheduler.alphas_cumprod)


def cifar_ratio() -> float:
    """The noise ratio of t = 70 of DDPM's linear schedule: sigma 0.12 in [0,1] units."""
    return cifar_schedule().ratio(CIFAR_T_STAR)


def schedule_of(denoiser: object) -> Schedule:
    """The schedule of a denoiser; raises ValueError for one that is no diffusion model."""
    alphas_cumprod = getattr(denoiser, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise ValueError(f"{type(denoiser).__name__} has no schedule; only a diffusion model can "
                         "purify")  # fmt: skip
    return Schedule(alphas_cumprod)


def diffused(x: Tensor, alpha_bar: float | Tensor, noise: Tensor) -> Tensor:
    """x_t of images x (B,3,H,W) in [-1,1] under standard normal noise (B,3,H,W).

    `alpha_bar` is one number, or a tensor that broadcasts.
    """
    share = torch.as_tensor(alpha_bar, device=x.device)
    return share.sqrt().to(x.dtype) * x + (1 - share).sqrt().to(x.dtype) * noise
