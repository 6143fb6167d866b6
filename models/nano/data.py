"""Training data and profiles of nano's parts: images, captions' states, durations."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import ByT5Tokenizer, T5EncoderModel

from models.denoisers.prompts import encode_prompts
from models.evaluation.datasets.cifar10 import cifar10
from models.nano.architectures import LARGE
from models.training import Profile

PROFILES = {
    "text": Profile(steps=400, batch=64, learning_rate=1e-3),
    "head": Profile(
        steps=2_400, batch=512, learning_rate=0.75, weight_decay=2.66e-3, warm_up=0.2, clip=inf
    ),
    "stage1": Profile(steps=2_900, batch=96, learning_rate=1e-3, ema=0.998, restart=900),
    "stage2": Profile(steps=7_400, batch=64, learning_rate=1e-3, ema=0.999, restart=3_400),
    "guided": Profile(
        steps=5_600, batch=64, learning_rate=2e-4, ema=0.998, restart=1_600, restart_rate=1.0
    ),
    "consistent": Profile(
        steps=6_000, batch=80, learning_rate=1e-4, ema=0.998, restart=4_000, restart_rate=1.5
    ),
}


def generator_of(seed: int, step: int) -> Generator:
    """The generator of one step's random numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Images:
    """Flipped and shifted training images as float (B,3,32,32) in [-1,1], with their labels."""

    def __init__(self, folder: Path) -> None:
        whole = cifar10(folder, "train")
        self.pixels = torch.from_numpy(whole.images).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(whole.labels)

    def draw(self, batch: int, generator: Generator, shift: int) -> tuple[Tensor, Tensor]:
        """A random batch and its labels (B,), shifted by up to `shift` pixels each way."""
        rows = torch.randint(len(self.labels), (batch,), generator=generator)
        images = self.pixels[rows].float() / 127.5 - 1
        flipped = torch.rand(batch, generator=generator) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        if shift:
            padded = F.pad(images, [shift] * 4, mode="reflect")
            dy, dx = torch.randint(2 * shift + 1, (2, batch, 1), generator=generator)
            span = torch.arange(LARGE)
            images = padded[
                torch.arange(batch)[:, None, None, None],
                torch.arange(3)[None, :, None, None],
                (dy + span)[:, None, :, None],
                (dx + span)[:, None, None, :],
            ]
        return images, self.labels[rows]


class Captions:
    """Frozen prompt states of captions, cached."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = ByT5Tokenizer.from_pretrained(folder / "tokenizer")
        encoder: Any = T5EncoderModel.from_pretrained(folder / "text_encoder")
        self.encoder = encoder.to(device).eval()
        self.known: dict[str, Tensor] = {}

    def __call__(self, captions: list[str]) -> Tensor:
        """States (B,77,D)."""
        new = sorted(set(captions) - self.known.keys())
        if new:
            self.known.update(
                zip(new, encode_prompts(self.tokenizer, self.encoder, new), strict=True)
            )
        return torch.stack([self.known[words] for words in captions])
