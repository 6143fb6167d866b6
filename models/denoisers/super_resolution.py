"""The text-conditional super-resolution UNet as a denoiser, in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.denoisers.base import Denoiser
from models.denoisers.schedule import noise_ratios, timesteps
from models.memory import bytes_of, check_room
from models.runtime import Runtime, Torch
from models.zoo.inventory import hold
from models.zoo.sources import UNET, Network

NOISE_LEVELS = 1000.0
"""Largest noise level of a super-resolution UNet; k times the timestep is clamped to it."""


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
        self.alphas_cumprod = self._alpha_bar = alphas_cumprod.double().cpu()
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
