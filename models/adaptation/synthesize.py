"""Reference images from words alone: stage I, then stage II, through diffusers' IF pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.adaptation.plan import Plan, write_json
from models.adaptation.references import name_of_image
from models.denoisers.prompts import encode_prompts, fitting_prompts
from models.denoisers.super_resolution import read_unet
from models.files import written_whole
from models.memory import bytes_of, check_room, let_go
from models.zoo.inventory import hold
from models.zoo.sources import TEXT_ENCODER, Network

DRAWN = "drawn"
"""Below the references: stage I's images, until stage II has enlarged them."""
_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """Each stage's steps and guidance (method.md 5.1), and the noise level between them.

    `chunk` images are sampled at once. The images of a chunk never change, so a resumed run
    generates the same ones.
    """

    steps: int = 40
    guidance: float = 7.0
    upscale_steps: int = 30
    upscale_guidance: float = 4.0
    noise_level: int = 250
    chunk: int = 16


def encode(
    stage1: Path, prompts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """States (N,77,D) float32 of prompts, by stage I's own text encoder, which is then released.

    Raises ValueError for a prompt that it would truncate and TooLittleMemory, both before loading.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(stage1 / "tokenizer", local_files_only=True)
    fitting_prompts(tokenizer, prompts)
    folder = stage1 / "text_encoder"
    check_room("the text encoder", bytes_of(folder, TEXT_ENCODER, dtype.itemsize), device)
    loaded: Any = T5EncoderModel.from_pretrained(
        folder,
        dtype=dtype,
        variant=hold(folder, Network("", "config.json", TEXT_ENCODER)).variant,
        use_safetensors=True,
        local_files_only=True,
    )
    encoder = loaded.to(device).eval()
    parts = [
        encode_prompts(tokenizer, encoder, prompts[start : start + _TEXTS]).float().cpu()
        for start in range(0, len(prompts), _TEXTS)
    ]
    del loaded, encoder
    let_go()
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Stage I's images (N,3,h,w), and the states (N,S) uint8 of the generators for stage II."""

    images: Tensor
    generators: Tensor

    @classmethod
    def read(cls, path: Path) -> Self:
        """Images as written by `write`, to the bit."""
        return cls(**load_file(path))

    def write(self, path: Path) -> None:
        """Write the images atomically."""
        with written_whole(path) as partial:
            save_file({"images": self.images, "generators": self.generators}, partial)


class _Float32Outside(nn.Module):
    """A UNet in any dtype whose pipeline holds images and draws noise in float32."""

    dtype = torch.float32

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self._unet, self.config, self.device = unet, unet.config, unet.device

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any
    ) -> tuple[Tensor]:
        inside = self._unet.dtype
        output = self._unet(sample.to(inside), timestep, encoder_hidden_states.to(inside), **more)
        return (output[0].float(),)


def _normalise_channels_first(unet: nn.Module) -> None:
    """Reorder a channels-last UNet's groups before they are normalized.

    On a CPU torch normalizes channels-last groups of few channels more slowly than it reorders
    them.
    """
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda norm, inputs: (inputs[0].contiguous(),))


class Cascade:
    """Both stages of a text-to-image pixel cascade, read from folders in DeepFloyd's layout.

    A stage is loaded at its first use and releases the other: memory holds one at a time. The UNets
    compute in `dtype`, all else in float32.
    """

    def __init__(
        self,
        stage1: Path,
        stage2: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._folders = stage1, stage2
        self._device, self._dtype = device, dtype
        self._held: tuple[Path, Any] | None = None

    def __call__(
        self, states: Tensor, empty: Tensor, seeds: Sequence[int], sampling: Sampling
    ) -> NDArray[np.uint8]:
        """One image per prompt, (N,H,W,3) uint8.

        `states` (N,77,D) are the prompts', `empty` (77,D) the empty prompt's. Image i depends only
        on its own prompt and seed, up to the rounding of its batch.
        """
        return self.enlarge(self.draw(states, empty, seeds, sampling), states, empty, sampling)

    def draw(
        self, states: Tensor, empty: Tensor, seeds: Sequence[int], sampling: Sampling
    ) -> Drawn:
        """Stage I's images; parameters as `__call__`."""
        from diffusers import IFPipeline

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self._stage(IFPipeline, self._folders[0])(
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=generators,
            **self._told(states, empty),
        ).images
        states_after = torch.stack([generator.get_state() for generator in generators])
        return Drawn(images.cpu().contiguous(), states_after)

    def enlarge(
        self, drawn: Drawn, states: Tensor, empty: Tensor, sampling: Sampling
    ) -> NDArray[np.uint8]:
        """Stage II's images; parameters as `__call__`."""
        from diffusers import IFSuperResolutionPipeline

        generators = [torch.Generator().set_state(state.clone()) for state in drawn.generators]
        stage2 = self._stage(IFSuperResolutionPipeline, self._folders[1])
        side = stage2.unet.config.sample_size
        images = stage2(
            image=drawn.images.to(self._device),
            height=side,
            width=side,
            num_inference_steps=sampling.upscale_steps,
            guidance_scale=sampling.upscale_guidance,
            noise_level=sampling.noise_level,
            generator=generators,
            **self._told(states, empty),
        ).images
        unit = (F.hardtanh(images) + 1) / 2
        rounded: NDArray[np.uint8] = (
            (255 * unit).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        return rounded

    def _told(self, states: Tensor, empty: Tensor) -> dict[str, Any]:
        return {
            "prompt_embeds": states.to(self._device),
            "negative_prompt_embeds": empty.to(self._device).expand_as(states),
            "output_type": "pt",
        }

    def _stage(self, kind: Any, folder: Path) -> Any:
        from diffusers import DDPMScheduler, IFSuperResolutionPipeline

        if self._held is None or self._held[0] != folder:
            self._held = None
            let_go()
            unet = read_unet(folder, self._dtype, self._device)
            unet.to(memory_format=torch.channels_last)
            if self._device.type == "cpu":
                _normalise_channels_first(unet)
            parts = {"unet": _Float32Outside(unet)}
            schedulers = ["scheduler"]
            if kind is IFSuperResolutionPipeline:
                schedulers.append("image_noising_scheduler")
            for name in schedulers:
                parts[name] = DDPMScheduler.from_pretrained(folder / name, local_files_only=True)
            pipeline = kind(**parts, **_ABSENT, requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
            self._held = folder, pipeline
        return self._held[1]


_ABSENT: dict[str, None] = dict.fromkeys(
    ("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
)


def synthesize(
    plan: Plan,
    folder: Path,
    cascade: Callable[[], Cascade],
    states: Tensor,
    sampling: Sampling,
    on_image: Callable[[int, int], None] = lambda done, whole: None,
) -> None:
    """Generate the plan's missing reference images in `folder`, each a PNG and a JSON.

    `states` (K+1,77,D) are the labels' prompts' and, last, the empty prompt's. The `cascade` is
    created if an image is missing. All missing images go through stage I before the first goes
    through stage II. `on_image` gets the number of passes through a stage done, and of all.
    """
    (folder / DRAWN).mkdir(parents=True, exist_ok=True)
    wanted = [(label, shot) for label in range(len(plan.labels)) for shot in range(plan.shots)]
    chunks = {
        start: chunk
        for start in range(0, len(wanted), sampling.chunk)
        for chunk in [wanted[start : start + sampling.chunk]]
        if not all(_is_kept(folder, name_of_image(*each)) for each in chunk)
    }
    drawn = {start: folder / DRAWN / f"{start}.safetensors" for start in chunks}
    undrawn = {start: chunk for start, chunk in chunks.items() if not drawn[start].exists()}
    whole = 2 * len(wanted)
    done = whole - sum(len(chunk) for chunk in (*chunks.values(), *undrawn.values()))
    on_image(done, whole)
    if chunks:
        made = cascade()
        for start, chunk in undrawn.items():
            seeds = [plan.seed_of(*each) for each in chunk]
            made.draw(_states(states, chunk), states[-1], seeds, sampling).write(drawn[start])
            on_image(done := done + len(chunk), whole)
        for start, chunk in chunks.items():
            found = Drawn.read(drawn[start])
            images = made.enlarge(found, _states(states, chunk), states[-1], sampling)
            for each, image in zip(chunk, images, strict=True):
                _keep(folder, name_of_image(*each), image, _described(plan, each, sampling))
            drawn[start].unlink()
            on_image(done := done + len(chunk), whole)
    shutil.rmtree(folder / DRAWN)


def _states(states: Tensor, chunk: Sequence[tuple[int, int]]) -> Tensor:
    return states[torch.tensor([label for label, _ in chunk])]


def _described(plan: Plan, each: tuple[int, int], sampling: Sampling) -> dict[str, Any]:
    label, shot = each
    return {
        "label": plan.labels[label],
        "label_index": label,
        "shot": shot,
        "prompt": plan.template.format(plan.words[label]),
        "seed": plan.seed_of(label, shot),
        "sampling": asdict(sampling),
    }


def _is_kept(folder: Path, name: str) -> bool:
    """Whether an image exists and can be read."""
    try:
        with Image.open(folder / f"{name}.png") as stored:
            stored.verify()
    except (OSError, SyntaxError):
        return False
    return (folder / f"{name}.json").exists()


def _keep(folder: Path, name: str, image: NDArray[np.uint8], described: dict[str, Any]) -> None:
    """Write the PNG and then, as the sign that it is complete, its JSON."""
    with written_whole(folder / f"{name}.png") as partial:
        Image.fromarray(image).save(partial, "PNG")
    write_json(folder / f"{name}.json", described)
