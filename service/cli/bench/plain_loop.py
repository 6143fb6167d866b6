"""A plain loop over the default task's networks, which `bench` compares the service with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

import models.zoo.vision  # noqa: F401 - registers the head's tower with timm
from models.bundle import PROMPT_STATES, Bundle
from models.smoothing import best_device


def plain_loop(
    unet: Any, alphas_cumprod: Tensor, states: Tensor, k: float, clip: Any, text: Tensor,
    x: Tensor, sigma: float, n: int,
) -> Tensor:  # fmt: skip
    """Votes by the plainest loop: float32, eager, torch.randn, batches of 64."""
    t = int(((1 - alphas_cumprod) / alphas_cumprod).sqrt().ge(2 * sigma).nonzero()[0])
    alpha_bar, level = alphas_cumprod[t].to(x), torch.tensor([min(k * t, 1000.0)]).to(x)
    mean, std = (
        torch.tensor(v).to(x)[:, None, None]
        for v in (clip.visual.image_mean, clip.visual.image_std)
    )
    counts = torch.zeros(len(text), dtype=torch.long)
    with torch.inference_mode():
        for start in range(0, n, 64):
            rows = min(64, n - start)
            x_t = (2 * (x + sigma * torch.randn(rows, *x.shape).to(x)) - 1) * alpha_bar.sqrt()
            prompt, levels = states.expand(rows, -1, -1), level.expand(rows)
            noise = unet(torch.cat([x_t, x_t], 1), t, prompt, class_labels=levels).sample[:, :3]
            x_0 = ((x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()).clamp(-1, 1)
            features = clip.encode_image(((x_0 + 1) / 2 - mean) / std, normalize=True)
            counts += torch.bincount((features @ text.T).argmax(1).cpu(), minlength=len(text))
    return counts


def loaded(bundle: Bundle, pixels: NDArray[np.uint8], sigma: float, n: int) -> Callable[[], Tensor]:
    """The plain loop over the bundle's networks, as diffusers and open_clip load them.

    `pixels` is (height, width, 3). Raises ValueError for a head of another image size, since the
    loop does not resize.
    """
    stage2, head, device = bundle.denoiser.verified(), bundle.classifier.verified(), best_device()
    unet = UNet2DConditionModel.from_pretrained(stage2 / "unet", use_safetensors=True).eval()
    scheduler = DDPMScheduler.from_pretrained(stage2 / "scheduler")
    states = load_file(bundle.folder / PROMPT_STATES)["states"].float()[None].to(device)
    clip = open_clip.create_model(f"local-dir:{head}", device=device).eval()
    if tuple(clip.visual.image_size) != (bundle.resolution,) * 2:
        raise ValueError(
            f"the head takes images of {clip.visual.image_size}, the task of {bundle.resolution}"
        )
    words = open_clip.get_tokenizer(f"local-dir:{head}")(
        [bundle.template.format(word) for word in bundle.words]
    )
    with torch.inference_mode():
        text = clip.encode_text(words.to(device), normalize=True)
    x = torch.tensor(pixels, device=device).permute(2, 0, 1).float() / 255
    networks = unet.to(device), scheduler.alphas_cumprod, states, bundle.k, clip, text
    return partial(plain_loop, *networks, x, sigma, n)
