"""Reference images from words alone: stage I, then stage II, through diffusers' IF pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import IFPipeline, IFSuperResolutionPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from models.adaptation.plan import Plan, write_json
from models.denoiser import encode_prompts
from models.files import written_whole

CHUNK = 16
"""Images sampled at once; always the same companions, so that a resumed run makes the same."""
_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """Each stage's steps and guidance (method.md 5.1), and the noise level between them."""

    steps: int = 40
    guidance: float = 7.0
    upscale_steps: int = 30
    upscale_guidance: float = 4.0
    noise_level: int = 250


def encode(
    stage1: Path, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """States (N,77,D) float32 of prompts, by stage I's own text encoder, which is then let go.

    Raises ValueError for a prompt that it would cut.
    """
    tokenizer = AutoTokenizer.from_pretrained(stage1 / "tokenizer", local_files_only=True)
    loaded: Any = T5EncoderModel.from_pretrained(
        stage1 / "text_encoder", dtype=dtype, use_safetensors=True, local_files_only=True
    )
    encoder = loaded.to(device).eval()
    parts = [
        encode_prompts(tokenizer, encoder, prompts[start : start + _TEXTS]).float().cpu()
        for start in range(0, len(prompts), _TEXTS)
    ]
    return torch.cat(parts)


class Cascade:
    """Both stages of a text-to-image pixel cascade, read from folders in DeepFloyd's layout."""

    def __init__(
        self,
        stage1: Path,
        stage2: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def loaded(kind: Any, folder: Path, *absent: str) -> Any:
            pipeline = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                requires_safety_checker=False,
                **dict.fromkeys(
                    ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", *absent)
                ),
            )
            pipeline.set_progress_bar_config(disable=True)
            return pipeline.to(device)

        self._device, self._dtype = device, dtype
        self._stage1 = loaded(IFPipeline, stage1, "watermarker")
        self._stage2 = loaded(IFSuperResolutionPipeline, stage2, "watermarker")

    def __call__(
        self, states: Tensor, empty: Tensor, seeds: Sequence[int], sampling: Sampling
    ) -> NDArray[np.uint8]:
        """One image a prompt, (N,H,W,3) uint8, from the prompts' states (N,77,D) and the empty
        prompt's (77,D); image i depends on its own prompt and seed alone, up to the rounding of
        its batch."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        told = {
            "prompt_embeds": states.to(self._device, self._dtype),
            "negative_prompt_embeds": empty.to(self._device, self._dtype).expand_as(states),
            "generator": generators,
            "output_type": "pt",
        }
        small = self._stage1(
            num_inference_steps=sampling.steps, guidance_scale=sampling.guidance, **told
        ).images
        side = self._stage2.unet.config.sample_size
        images = self._stage2(
            image=small,
            height=side,
            width=side,
            num_inference_steps=sampling.upscale_steps,
            guidance_scale=sampling.upscale_guidance,
            noise_level=sampling.noise_level,
            **told,
        ).images
        unit = (F.hardtanh(images.float()) + 1) / 2
        rounded: NDArray[np.uint8] = (
            (255 * unit).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        return rounded


@dataclass(frozen=True, slots=True)
class References:
    """Made images (N,3,H,W) uint8 and their label indices (N,) int64."""

    images: Tensor
    labels: Tensor


def synthesize(
    plan: Plan,
    folder: Path,
    cascade: Callable[[], Cascade],
    states: Tensor,
    sampling: Sampling,
    on_image: Callable[[int, int], None] = lambda done, whole: None,
) -> None:
    """Make the plan's reference images in `folder`, each a PNG and a JSON, unless they are there.

    `states` (K+1,77,D) are the labels' prompts' and, last, the empty prompt's. The `cascade` is
    loaded if an image is missing. `on_image` hears how many are done of how many.
    """
    folder.mkdir(exist_ok=True)
    wanted = [(label, shot) for label in range(len(plan.labels)) for shot in range(plan.shots)]
    prompts, loaded = plan.prompts(), None
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        on_image(start, len(wanted))
        if all(_is_kept(folder, _name(*each)) for each in chunk):
            continue
        loaded = loaded or cascade()
        rows = torch.tensor([label for label, _ in chunk])
        seeds = [plan.seed_of(*each) for each in chunk]
        images = loaded(states[rows], states[-1], seeds, sampling)
        for (label, shot), seed, image in zip(chunk, seeds, images, strict=True):
            described = {
                "label": plan.labels[label],
                "label_index": label,
                "shot": shot,
                "prompt": prompts[label],
                "seed": seed,
                "sampling": asdict(sampling),
            }
            _keep(folder, _name(label, shot), image, described)
    on_image(len(wanted), len(wanted))


def read_references(plan: Plan, folder: Path, resolution: int) -> References:
    """The plan's images, shorter side to `resolution` pixels and the centre cut out of each."""
    images, labels = [], []
    for label in range(len(plan.labels)):
        for shot in range(plan.shots):
            with Image.open(folder / f"{_name(label, shot)}.png") as stored:
                image = _fitted(stored.convert("RGB"), resolution)
            images.append(np.asarray(image).transpose(2, 0, 1))
            labels.append(label)
    return References(torch.from_numpy(np.stack(images).copy()), torch.tensor(labels))


def _fitted(image: Image.Image, side: int) -> Image.Image:
    shorter = min(image.size)
    if shorter != side:
        scaled = (round(image.width * side / shorter), round(image.height * side / shorter))
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _name(label: int, shot: int) -> str:
    return f"{label}-{shot}"


def _is_kept(folder: Path, name: str) -> bool:
    """Whether an image is there and can be read."""
    try:
        with Image.open(folder / f"{name}.png") as stored:
            stored.verify()
    except (OSError, SyntaxError):
        return False
    return (folder / f"{name}.json").exists()


def _keep(folder: Path, name: str, image: NDArray[np.uint8], described: dict[str, Any]) -> None:
    """Write the PNG and then, as the sign that it is whole, its JSON."""
    with written_whole(folder / f"{name}.png") as partial:
        Image.fromarray(image).save(partial, "PNG")
    write_json(folder / f"{name}.json", described)
