"""Reference images from words alone: stage I, then stage II, through diffusers' IF pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import IFPipeline, IFSuperResolutionPipeline
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sampling:
    """Each stage's steps and guidance (method.md 5.1), and the noise level between them."""

    steps: int = 40
    guidance: float = 7.0
    upscale_steps: int = 30
    upscale_guidance: float = 4.0
    noise_level: int = 250


class Cascade:
    """Both stages of a text-to-image pixel cascade, read from folders in DeepFloyd's layout."""

    def __init__(self, stage1: Path, stage2: Path, device: torch.device) -> None:
        self._device = device
        self._stage1: Any = self._quiet(IFPipeline.from_pretrained(stage1)).to(device)
        self._stage2: Any = self._quiet(
            IFSuperResolutionPipeline.from_pretrained(
                stage2, text_encoder=self._stage1.text_encoder, tokenizer=self._stage1.tokenizer
            )
        ).to(device)

    @staticmethod
    def _quiet(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
    ) -> NDArray[np.uint8]:
        """One image a prompt, (N,H,W,3) uint8; image i depends on prompt and seed i alone, up to
        the rounding of its batch."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        small = self._stage1(
            prompt=list(prompts),
            generator=generators,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            output_type="pt",
        ).images
        side = self._stage2.unet.config.sample_size
        images = self._stage2(
            prompt=list(prompts),
            image=small,
            height=side,
            width=side,
            generator=generators,
            num_inference_steps=sampling.upscale_steps,
            guidance_scale=sampling.upscale_guidance,
            noise_level=sampling.noise_level,
            output_type="pt",
        ).images
        unit = (F.hardtanh(images.float()) + 1) / 2
        rounded: NDArray[np.uint8] = (
            (255 * unit).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        return rounded
