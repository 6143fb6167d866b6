"""Denoisers: from x + noise to an estimate of x, at any noise level, in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.memory import bytes_of, check_room
from models.runtime import Runtime, Torch
from models.zoo.captions import clean_caption
from models.zoo.inventory import hold
from models.zoo.sources import UNET, Network

PROMPT_TOKENS = 77
"""Length that DeepFloyd IF pads every prompt to."""
NOISE_LEVELS = 1000.0
"""Largest noise level of a super-resolution UNet; k times the timestep is clamped to it."""


class Denoiser(Protocol):
    """x_hat (B,3,H,W) in [0,1] units but never clipped, sigma (B,) float64 -> x0 in [0,1]."""

    largest_sigma: float

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """One estimate per row, (B,3,H,W) float32 clamped to [0,1]; rows do not affect one another.

        Raises ValueError for a sigma above `largest_sigma`.
        """


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """Prompts as DeepFloyd IF reads them (lower case, markup stripped); training uses the same."""
    return [clean_caption(prompt) for prompt in prompts]


def fitting_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The cleaned prompts; raises ValueError for one longer than 77 tokens."""
    cleaned = clean_prompts(prompts)
    for given, prompt in zip(prompts, cleaned, strict=True):
        tokens = len(tokenizer(prompt).input_ids)
        if tokens > PROMPT_TOKENS:
            raise ValueError(f"prompt {given!r} has {tokens} tokens; the limit is {PROMPT_TOKENS}")
    return cleaned


def encode_prompts(tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
    """States (B,77,D) of a T5 encoder's last layer, the attention mask used (method.md 1.6).

    Raises ValueError for a prompt longer than 77 tokens, which diffusers would truncate silently.
    """
    cleaned = fitting_prompts(tokenizer, prompts)
    encoded = tokenizer(
        cleaned, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt"
    ).to(next(text_encoder.parameters()).device)
    with torch.no_grad():
        states: Tensor = text_encoder(encoded.input_ids, encoded.attention_mask)[0]
    return states


def noise_ratios(alphas_cumprod: Tensor) -> Tensor:
    """sqrt((1 - alpha_bar_t) / alpha_bar_t), (T,) float64: noise strength in [-1,1] at each t."""
    alpha_bar = alphas_cumprod.double().cpu()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def timesteps(ratios: Tensor, sigma: Tensor) -> Tensor:
    """First integer t >= 1 whose ratio reaches 2 sigma (method.md 1.2), (B,) int64.

    `sigma` (B,) float64 is in [0,1] units. Raises ValueError past the schedule's end.
    """
    largest = float(ratios[-1]) / 2
    if float(sigma.max()) > largest:
        raise ValueError(f"sigma {float(sigma.max())} exceeds the denoiser's largest, {largest}")
    return torch.searchsorted(ratios[1:].contiguous(), 2 * sigma) + 1


class _Conditioned(nn.Module):
    """The UNet with its prompt, from tensors to one tensor: x_t, t and noise level -> epsilon."""

    states: Tensor

    def __init__(self, unet: nn.Module, states: Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("states", states[None], persistent=False)

    def forward(self, x_t: Tensor, t: Tensor, level: Tensor) -> Tensor:
        doubled = torch.cat([x_t, x_t], 1)
        states = self.states.expand(len(x_t), -1, -1)
        output = self.unet(doubled, t, states, class_labels=level, return_dict=False)
        epsilon: Tensor = output[0][:, :3]
        return epsilon


class SuperResolutionDenoiser:
    """A text-conditional super-resolution UNet that conditions itself (Choi et al. 2024, Eq. 9).

    `unet` has DeepFloyd IF-II's signature: 6 input channels (x_t beside its condition), noise level
    as class label, the first 3 output channels the noise. `states` (77,D) are the prompt's; `k`
    scales the timestep given as noise level (Eq. 8). Source: method.md section 1.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Tensor,
        states: Tensor,
        k: float,
        runtime: Runtime | None = None,
    ) -> None:
        parameter = next(unet.parameters())
        self._dtype = parameter.dtype
        conditioned = _Conditioned(unet, states.to(parameter.device, parameter.dtype)).eval()
        self._epsilon = (runtime or Torch()).prepare(conditioned)
        self._k = k
        self._ratios = noise_ratios(alphas_cumprod)
        self._alpha_bar = alphas_cumprod.double().cpu()
        self.largest_sigma = float(self._ratios[-1]) / 2

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser`; arithmetic outside the UNet keeps the dtype of `x_hat`."""
        t = timesteps(self._ratios, sigma.cpu())
        alpha_bar = self._alpha_bar[t].to(x_hat.device, x_hat.dtype)[:, None, None, None]
        x_t = (2 * x_hat - 1) * alpha_bar.sqrt()
        epsilon = self._epsilon(
            x_t.to(self._dtype),
            t.to(x_hat.device),
            (self._k * t.double()).clamp(max=NOISE_LEVELS).to(x_hat),
        ).to(x_hat.dtype)
        x_0: Tensor = (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        return (x_0.clamp(-1, 1) + 1) / 2


class NoDenoiser:
    """Plain smoothing (Cohen et al. 2019): the noisy image itself, not clipped."""

    largest_sigma = float("inf")

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """`x_hat` unchanged; this is the one denoiser whose output may leave [0,1]."""
        return x_hat


def read_unet(stage: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A stage's UNet in `dtype` on the device, from its half-precision file where there is one.

    Only safetensors are read; nothing is fetched. Raises TooLittleMemory before loading.
    """
    from diffusers import UNet2DConditionModel

    folder = stage / "unet"
    check_room(f"{stage.name}'s UNet", bytes_of(folder, UNET, dtype.itemsize), device)
    unet = UNet2DConditionModel.from_pretrained(
        folder,
        torch_dtype=dtype,
        variant=hold(folder, Network("", "config.json", UNET)).variant,
        use_safetensors=True,
        local_files_only=True,
    )
    return unet.to(device)


def load_super_resolution(
    folder: Path,
    states: Tensor,
    k: float,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    adapter: Path | None = None,
) -> Denoiser:
    """A denoiser from a stage-II folder in diffusers' layout (`unet/`, `scheduler/`).

    `states` (77,D) are the prompt's. An `adapter` file is added to the weights in float32, on the
    CPU. Raises TooLittleMemory as `read_unet` does.
    """
    from diffusers import DDPMScheduler

    if adapter is None:
        unet = read_unet(folder, dtype, device)
    else:
        needed = bytes_of(folder / "unet", UNET, dtype.itemsize)
        check_room(f"{folder.name}'s UNet", needed, device)
        unet = read_unet(folder, torch.float32, torch.device("cpu"))
        unet.load_lora_adapter(
            str(adapter.parent), prefix=None, weight_name=adapter.name, use_safetensors=True
        )
        unet.fuse_lora()
        unet.unload_lora()
        nn.Module.to(unet, dtype)  # diffusers' own warns about parts that this UNet lacks
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    unet = unet.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    return SuperResolutionDenoiser(unet, scheduler.alphas_cumprod, states, k, runtime)


def load_none(
    folder: Path,
    states: Tensor | None,
    k: float,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    adapter: Path | None = None,
) -> Denoiser:
    """Plain smoothing, which needs no weights; every argument is ignored."""
    return NoDenoiser()


Loader = Callable[[Path, Any, float, torch.device, torch.dtype, Runtime, Path | None], Denoiser]
DENOISERS: dict[str, Loader] = {
    "super-resolution": load_super_resolution,
    "none": load_none,
}
"""The place to add a denoiser: one adapter above and one line here."""
