"""Recipe of nano's head, a small CLIP-class classifier that never sees noise."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from math import log
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from transformers import ByT5Tokenizer

import models.zoo.vision  # noqa: F401 - registers its towers with timm
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.nano.architectures import HEAD_CONFIG, LARGE
from models.nano.captions import caption
from models.nano.data import PROFILES, Images, generator_of
from models.training import Profile, fit

CAPTIONS = 80
"""Captions per step of the head's text tower, the same number for each class."""
LOGIT_SCALE = 6.0
"""The head's scale, close to its calibration on held-back images denoised at sigma 0.25."""


def soften(images: Tensor, generator: Generator) -> Tensor:
    """Images with ordinary blur or down-up-sampling on half of the rows; no noise, no denoiser."""
    batch = len(images)
    parts = list(images.split(batch // 4))
    quarter = len(parts[1])
    sigma = 0.3 + 1.4 * torch.rand(quarter, 1, generator=generator)
    taps = torch.exp(-((torch.arange(-4, 5)[None] / sigma) ** 2) / 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)
    rows = F.pad(parts[1], [4] * 4, mode="reflect").reshape(1, -1, LARGE + 8, LARGE + 8)
    rows = F.conv2d(rows, taps[:, None, :, None], groups=3 * quarter)
    rows = F.conv2d(rows, taps[:, None, None, :], groups=3 * quarter)
    parts[1] = rows.reshape(parts[1].shape)
    size = int(torch.randint(10, 27, (1,), generator=generator))
    small = F.interpolate(parts[2], size=(size, size), mode="bilinear", antialias=True)
    parts[2] = F.interpolate(small, size=(LARGE, LARGE), mode="bicubic", antialias=True)
    return torch.cat(parts)


def train_head(arguments: argparse.Namespace, profile: Profile, device: torch.device) -> None:
    """Train a small CLIP that never sees noise.

    First the image tower is trained against one fixed direction per class. Then the text tower is
    trained, behind the frozen image tower, to map a class's captions to its direction. Optimizer
    and rates of the image tower: arXiv 2404.00498.
    """
    folder = arguments.out / "head"
    folder.mkdir(parents=True, exist_ok=True)
    described = HEAD_CONFIG["model_cfg"]
    mean, std = (
        torch.tensor(HEAD_CONFIG["preprocess_cfg"][name])[:, None, None] for name in ("mean", "std")
    )
    model = open_clip.CLIP(
        described["embed_dim"],
        described["vision_cfg"],
        described["text_cfg"],
        init_logit_scale=log(LOGIT_SCALE),
    ).to(device, memory_format=torch.channels_last)
    images = Images(arguments.data)
    directions = torch.linalg.qr(
        torch.randn(described["embed_dim"], len(CIFAR10_LABELS), generator=generator_of(0, 0))
    ).Q.to(device)
    visual: Any = model.visual
    first = images.pixels[:5_000].float() / 255
    visual.trunk.whiten(((first - mean) / std).to(device))

    def image_losses(step: int) -> Iterator[Tensor]:
        generator = generator_of(arguments.seed, step)
        pixels, labels = images.draw(profile.batch, generator, shift=2)
        pixels = ((soften(pixels, generator).clamp(-1, 1) + 1) / 2 - mean) / std
        features = visual(pixels.to(device, memory_format=torch.channels_last))
        with torch.autocast(device.type, enabled=False):
            logits = features.float() @ directions / 9
        yield F.cross_entropy(logits, labels.to(device), label_smoothing=0.2)

    named = dict(visual.named_parameters())
    shifts = [named.pop(name) for name in list(named) if name.endswith("bias")]
    filters = [named.pop(name) for name in list(named) if ".conv" in name or ".proj" in name]
    for parameter in named.values():
        parameter.requires_grad_(False)  # The whitening stem, and the norms' scales.
    optimizer = torch.optim.SGD(
        [
            {"params": shifts, "scale": 64.0, "weight_decay": profile.weight_decay / 64},
            {"params": filters, "weight_decay": profile.weight_decay},
        ],
        momentum=0.85,
        nesterov=True,
    )
    fit("head", visual, image_losses, arguments.out, profile, device, optimizer=optimizer)
    visual.requires_grad_(False)
    model.logit_scale.requires_grad_(False)

    tokenizer = ByT5Tokenizer(extra_ids=125)
    length = described["text_cfg"]["context_length"]
    classes = torch.arange(len(CIFAR10_LABELS), device=device).repeat(
        CAPTIONS // len(CIFAR10_LABELS)
    )

    def text_losses(step: int) -> Iterator[Tensor]:
        draw = random.Random(arguments.seed * 1_000_003 + step)
        words = tokenizer(
            [caption(CIFAR10_LABELS[label], draw) for label in classes],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        features = model.encode_text(words.input_ids.to(device))
        with torch.autocast(device.type, enabled=False):
            cosine = F.normalize(features.float(), dim=-1) @ directions
        yield F.cross_entropy(model.logit_scale.exp() * cosine, classes)

    tower = nn.ModuleDict(
        {"embedding": model.token_embedding, "layers": model.transformer, "norm": model.ln_final}
    )
    tower.register_parameter("positions", model.positional_embedding)
    tower.register_parameter("projection", model.text_projection)
    fit("head-text", tower, text_losses, arguments.out, PROFILES["text"], device)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in weights.items()},
        folder / "open_clip_model.safetensors",
    )
    (folder / "open_clip_config.json").write_text(json.dumps(HEAD_CONFIG, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
