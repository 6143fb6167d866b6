"""Diffusion purification of images before a classifier, which proves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.bundle import Bundle
from models.classifiers.base import Classifier
from models.denoisers.base import Denoiser
from models.purification.auxiliary import Auxiliary, read_auxiliary
from models.purification.guidance import Guidance
from models.purification.keyed import MAX_STEPS, Noise, Row, keyed_noise
from models.purification.reverse import Schedule, diffused, read_schedule
from models.smoothing import best_device, load


@dataclass(frozen=True, slots=True)
class Settings:
    """How images are purified; docs/purification.md states which defaults are this project's.

    `t_star` None is the schedule's own (`Schedule.t_star`). `guidance` is s; 0 is the plain process
    of DiffPure (Nie et al. 2022, arXiv 2205.07460). The norm of g_t is at most `constraint` times
    that of the diffusion model's score. An image has `draws` independent purifications.
    Raises ValueError for values out of range.
    """

    t_star: int | None = None
    guidance: float = 0.0
    constraint: float = 1.0
    draws: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance is {self.guidance}; it must be finite and at least 0")
        if not 0 < self.constraint < math.inf:
            raise ValueError(f"constraint is {self.constraint}; it must be finite and above 0")
        if not 1 <= self.draws <= MAX_STEPS:
            raise ValueError(f"draws is {self.draws}; it must be 1 to {MAX_STEPS}")


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
    def probabilities(self, images: Tensor, key: bytes, first: int = 0) -> Tensor:
        """The mean softmax (B,K) of each image's draws; the answer is its argmax.

        `images` (B,3,H,W) uint8 are numbers `first` and on under `key` (32 bytes). All draws of all
        images are one batch. Raises FloatingPointError for logits that are not finite.
        """
        draws = self._settings.draws
        rows = [Row(first + image, draw) for image in range(len(images)) for draw in range(draws)]
        noise = keyed_noise(key, rows, tuple(images.shape[1:]), images.device)
        logits = self.logits((images / 255).repeat_interleave(draws, 0), noise)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the logits of purified images are not finite")
        mean: Tensor = logits.softmax(1).unflatten(0, (len(images), draws)).mean(1)
        return mean

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
    with bundle.denoiser.opened(models_dir) as folder:
        schedule = read_schedule(folder)
    model = load(bundle, device=device, dtype=torch.float32, cpu_threads=0, models_dir=models_dir)
    network = None
    if auxiliary is not None:
        network = read_auxiliary(auxiliary, len(bundle.labels), device)
    return Purifier(model.denoiser, model.classifier, schedule, settings, network)
