"""Training of nano's stage II: upscaling, denoising, and denoising with the head behind it."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Generator, Tensor

from models.classifiers.base import Classifier
from models.classifiers.open_clip import load_open_clip
from models.denoisers.schedule import noise_ratios, timesteps
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.nano.architectures import (
    DEEPFLOYD_UNET,
    LARGE,
    SMALL,
    STAGE2_UNET,
    K,
    if_scheduler,
)
from models.nano.captions import BLANK, DEFAULT_TEMPLATE, TEMPLATES, caption
from models.nano.data import PROFILES, Captions, Images, generator_of
from models.runtime import Torch
from models.training import Profile, disagreement, fit

SMOOTHING_STEPS = (60, 760)
"""Timesteps that most denoising rows are drawn from: sigma 0.05 to 1.2."""
GUIDANCE = 0.003
"""Lambda, the weight of the head's cross-entropy: its gradient is about twice the error's."""
GUIDED_STEPS = 600
"""Rows at earlier timesteps than this (sigma 0.7) go to the head."""
CONSISTENT_GUIDANCE = 0.006
"""Lambda in the part `consistent`."""
CONSISTENCY = 2.5
"""Eta, the weight of the draws' disagreement beside the head's cross-entropy."""
CONSISTENT_SIGMAS = (0.15, 0.8)
"""Ends of the sigmas, drawn log-uniformly, at which an image gets its draws of noise."""
DRAWS = 2
"""Noisy rows of each image in the part `consistent`."""
BLANK_PROMPT = DEFAULT_TEMPLATE.format(BLANK)


def train_stage2(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train 16x16 to 32x32, and the denoiser.

    One row in four is super-resolution as the cascade samples it. In the others the noisy image
    conditions itself, with noise level k*t, as in smoothing.
    """
    unet: Any = UNet2DConditionModel(**STAGE2_UNET, **DEEPFLOYD_UNET)
    stage = _Stage2(unet, arguments, profile, device)
    stage.fit("stage2", lambda step: stage.denoising(step, None))


def train_guided(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train stage II further behind the frozen float32 head: MSE + lambda CE(head(x0)).

    This is personalization's loss (method.md 5.2) for every weight, on the training images, with
    its own lambda. Only denoising rows before GUIDED_STEPS go to the head.
    """
    unet = UNet2DConditionModel.from_pretrained(arguments.out / "stage2" / "unet")
    stage, head = _Stage2(unet, arguments, profile, device), _head(arguments, device)
    first = PROFILES["stage2"].steps
    stage.fit("guided", lambda step: stage.denoising(step + first, head))


def train_consistent(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train stage II further for agreeing votes: MSE + lambda (CE + eta disagreement).

    The disagreement is that of DRAWS noisy rows of an image behind the head (Jeong & Shin, arXiv
    2006.04062, who trained a classifier by it).
    """
    unet = UNet2DConditionModel.from_pretrained(arguments.out / "guided" / "unet")
    stage, head = _Stage2(unet, arguments, profile, device), _head(arguments, device)
    first = PROFILES["stage2"].steps + PROFILES["guided"].steps
    stage.fit("consistent", lambda step: stage.consistent(step + first, head))


def _head(arguments: argparse.Namespace, device: torch.device) -> Classifier:
    folder = arguments.out / "head"
    return load_open_clip(folder, CIFAR10_LABELS, DEFAULT_TEMPLATE, device, torch.float32, Torch())


class _Stage2:
    """Losses of stage II, each of one numbered step."""

    def __init__(
        self, unet: Any, arguments: argparse.Namespace, profile: Profile, device: torch.device
    ) -> None:
        self._arguments, self._profile, self._device = arguments, profile, device
        self._scheduler = if_scheduler(sample_max_value=1.0)
        self._unet = unet.to(device, memory_format=torch.channels_last)
        self._forward = torch.compile(self._unet) if arguments.compile else self._unet
        self._images = Images(arguments.data)
        self._states = Captions(arguments.out / "stage1", device)

    def fit(self, part: str, losses: Any) -> None:
        """Train, and save the UNet with both schedulers in the part's folder."""
        folder = self._arguments.out / part
        fit(part, self._unet, losses, self._arguments.out, self._profile, self._device)
        self._unet.save_pretrained(folder / "unet", safe_serialization=True)
        self._scheduler.save_pretrained(folder / "scheduler")
        self._scheduler.save_pretrained(folder / "image_noising_scheduler")

    def denoising(self, step: int, head: Classifier | None) -> Iterator[Tensor]:
        """The noise's error, with the head's cross-entropy where there is one."""
        batch = self._profile.batch
        upscaled = batch // 4
        generator, draw = self._drawn(step)
        pixels, labels = self._images.draw(batch, generator, shift=0)
        noise = torch.randn(pixels.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        focused = torch.randint(*SMOOTHING_STEPS, (batch,), generator=generator)
        narrow = torch.rand(batch, generator=generator) < 0.8
        narrow[:upscaled] = False
        t = torch.where(narrow, focused, t)
        x_t = self._scheduler.add_noise(pixels, noise, t)
        words = [_caption(label, draw) for label in labels]
        for row in range(upscaled, batch):
            if draw.random() < 0.7:
                words[row] = _blank(draw, 0.7)
        predicted = self._predicted(pixels[:upscaled], x_t, t, words, generator)
        error = F.mse_loss(predicted, noise.to(self._device))
        if head is None:
            yield error
            return
        shown = narrow & (t < GUIDED_STEPS)
        logits = self._logits(head, x_t[shown], t[shown], predicted[shown])
        yield error + GUIDANCE * F.cross_entropy(logits, labels[shown].to(self._device))

    def consistent(self, step: int, head: Classifier) -> Iterator[Tensor]:
        """The noise's error, and behind the head cross-entropy and disagreement of the draws.

        The first images of a batch are upscaled, the others have DRAWS rows each.
        """
        batch = self._profile.batch
        upscaled = batch // 5
        seen = (batch - upscaled) // DRAWS
        generator, draw = self._drawn(step)
        pixels, labels = self._images.draw(upscaled + seen, generator, shift=0)
        low, high = (math.log(end) for end in CONSISTENT_SIGMAS)
        share = torch.rand(seen, generator=generator, dtype=torch.float64)
        sigma = (low + (high - low) * share).exp()
        focused = timesteps(noise_ratios(self._scheduler.alphas_cumprod), sigma)
        t = torch.cat(
            [torch.randint(1000, (upscaled,), generator=generator), focused.repeat(DRAWS)]
        )
        words = [_caption(label, draw) for label in labels[:upscaled]]
        words += [_blank(draw, 0.8) for _ in range(seen)] * DRAWS
        doubled = torch.cat([pixels[:upscaled], pixels[upscaled:].repeat(DRAWS, 1, 1, 1)])
        noise = torch.randn(doubled.shape, generator=generator)
        x_t = self._scheduler.add_noise(doubled, noise, t)
        predicted = self._predicted(pixels[:upscaled], x_t, t, words, generator)
        rows = slice(upscaled, None)
        logits = self._logits(head, x_t[rows], t[rows], predicted[rows])
        named = F.cross_entropy(logits, labels[rows].repeat(DRAWS).to(self._device))
        differing = disagreement(logits.unflatten(0, (DRAWS, seen))).mean()
        error = F.mse_loss(predicted, noise.to(self._device))
        yield error + CONSISTENT_GUIDANCE * (named + CONSISTENCY * differing)

    def _drawn(self, step: int) -> tuple[Generator, random.Random]:
        return generator_of(self._arguments.seed, step), random.Random(step)

    def _predicted(
        self, upscaled: Tensor, x_t: Tensor, t: Tensor, words: list[str], generator: Generator
    ) -> Tensor:
        """Noise predicted (B,3,32,32) for x_t, whose first rows are upscaled from `upscaled`."""
        count = len(upscaled)
        small = F.interpolate(upscaled, size=(SMALL, SMALL), mode="area")
        blurred = F.interpolate(small, size=(LARGE, LARGE), mode="bilinear", align_corners=True)
        level = torch.randint(1000, (count,), generator=generator)
        other = torch.randn(blurred.shape, generator=generator)
        condition = torch.cat([self._scheduler.add_noise(blurred, other, level), x_t[count:]])
        levels = torch.cat([level.float(), (K * t[count:]).clamp(max=1000)])
        model_input = torch.cat([x_t, condition], 1)
        predicted: Tensor = self._forward(
            model_input.to(self._device, memory_format=torch.channels_last),
            t.to(self._device),
            self._states(words),
            class_labels=levels.to(self._device),
        ).sample
        return predicted[:, :3].float()

    def _logits(self, head: Classifier, x_t: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
        """Logits (B,K) of the one-step estimates of x0."""
        alpha_bar = self._scheduler.alphas_cumprod[t][:, None, None, None].to(self._device)
        x_0 = (x_t.to(self._device) - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        with torch.autocast(self._device.type, enabled=False):
            return head((x_0.clamp(-1, 1) + 1) / 2)


def _caption(label: Tensor, draw: random.Random) -> str:
    """A caption of the label, or in one of ten cases none, for classifier-free guidance."""
    return "" if draw.random() < 0.1 else caption(CIFAR10_LABELS[label], draw)


def _blank(draw: random.Random, share: float) -> str:
    """The blank prompt, or with the rest's probability any template with a blank in it."""
    return BLANK_PROMPT if draw.random() < share else draw.choice(TEMPLATES).format(BLANK)
