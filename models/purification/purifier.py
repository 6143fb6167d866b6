"""Diffusion purification of images before a classifier, which proves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.classifiers.base import Classifier
from models.denoisers.base import Denoiser
from models.purification.guidance import Guidance
from models.purification.keyed import Noise, Row, keyed_noise
from models.purification.reverse import Schedule, diffused

if TYPE_CHECKING:
    from models.purification.auxiliary import Auxiliary


@dataclass(frozen=True, slots=True)
class Settings:
    """How images are purified; docs/purification.md states which defaults are this project's.

    `t_star` None is the schedule's own (`Schedule.t_star`). `guidance` is s; 0 is the plain process
    of DiffPure (Nie et al. 2022, arXiv 2205.07460). The norm of g_t is at most `constraint` times
    that of the diffusion model's score. Raises ValueError for values out of range.
    """

    t_star: int | None = None
    guidance: float = 0.0
    constraint: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; it must be finite and at least 0")
        if not 0 < self.constraint < math.inf:
            raise ValueError(f"constraint is {self.constraint}; it must be finite and above 0")


class Purifier:
    """Diffuse to t*, reverse step by step, classify.

    `denoiser` is any diffusion model's, `schedule` its own. Raises ValueError for a t* that the
    schedule does not have or that is noisier than the auxiliary network's training, and for
    guidance without an auxiliary network.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier,
        schedule: Schedule,
        settings: Settings,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        self.t_star = schedule.t_star(settings.t_star)
        if settings.guidance and auxiliary is None:
            raise ValueError(
                f"guidance is {settings.guidance} without an auxiliary network; "
                "give its folder, or guidance 0"
            )
        self._auxiliary = auxiliary if settings.guidance else None
        if self._auxiliary:
            ratio, limit = schedule.ratio(self.t_star), self._auxiliary.largest_ratio
            if ratio > limit:
                raise ValueError(
                    f"t_star is {self.t_star}, of noise ratio {ratio:.4f}; the auxiliary network "
                    f"was trained up to {limit:.4f}: lower t_star"
                )
        self._denoiser, self._classifier = denoiser, classifier
        self._schedule, self._settings = schedule, settings

    def purified(self, x: Tensor, noise: Noise) -> Tensor:
        """Images (B,3,H,W) in [0,1] of x (B,3,H,W) in [0,1], under the noise of each row.

        The gradient by x is the full one: through every step, the guidance included. Steps are
        checkpointed, so memory holds the activations of one step and the images of all.
        """
        given = 2 * x - 1
        alpha_bar = self._schedule.alpha_bar(self.t_star)
        x_t = diffused(given, alpha_bar, noise(0))
        guidance = Guidance(self._auxiliary, given) if self._auxiliary else None
        for t in range(self.t_star, 0, -1):
            drawn = noise(t)
            if torch.is_grad_enabled() and x.requires_grad:
                x_t = checkpoint(self._step, x_t, t, guidance, drawn, use_reentrant=False)
            else:
                x_t = self._step(x_t, t, guidance, drawn)
        return (x_t + 1) / 2

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """Logits (B,K) of the purified images, one purification a row; see `purified`."""
        return self._classifier(self.purified(x, noise))

    @torch.no_grad()
    def labels(
        self, pixels: Tensor, key: bytes, start: int, stop: int, batch_rows: int | None = None
    ) -> NDArray[np.int64]:
        """The label index of each of an image's purifications (stop - start,).

        `pixels` (3,H,W) is uint8, and the key has 32 bytes. The networks compute `batch_rows` rows,
        those that are not wanted from black images without noise; by default none. Raises
        FloatingPointError for logits that are not finite.
        """
        count = stop - start
        padding = 0 if batch_rows is None else batch_rows - count
        drawn = keyed_noise(
            key, [Row(0, draw) for draw in range(start, stop)], tuple(pixels.shape), pixels.device
        )
        x = torch.cat([(pixels / 255).expand(count, *pixels.shape),
                       torch.zeros(padding, *pixels.shape, device=pixels.device)])  # fmt: skip
        logits = self.logits(x, lambda step: F.pad(drawn(step), (0, 0, 0, 0, 0, 0, 0, padding)))
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the logits of purified images are not finite")
        found: NDArray[np.int64] = logits.argmax(1)[:count].cpu().numpy()
        return found

    def _step(self, x_t: Tensor, t: int, guidance: Guidance | None, noise: Tensor) -> Tensor:
        """x_{t-1} ~ N(mu(x_t, t) + s Sigma_t g_t, Sigma_t) (method.md 7)."""
        alpha_bar = self._schedule.alpha_bar(t)
        sigma = torch.full((len(x_t),), self._schedule.ratio(t) / 2, dtype=torch.float64)
        x_0 = 2 * self._denoiser((x_t / math.sqrt(alpha_bar) + 1) / 2, sigma) - 1
        posterior = self._schedule.posterior(t)
        mean = posterior.of_x_0 * x_0 + posterior.of_x_t * x_t
        if guidance and posterior.variance:
            score = (x_t - math.sqrt(alpha_bar) * x_0) / (1 - alpha_bar)
            longest = self._settings.constraint * score.flatten(1).norm(dim=1)
            gradient = guidance.gradient(x_t, longest)
            mean = mean + self._settings.guidance * posterior.variance * gradient
        return mean + math.sqrt(posterior.variance) * noise
