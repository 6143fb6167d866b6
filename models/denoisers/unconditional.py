"""Unconditional pixel diffusion models as denoisers in one step (Carlini et al. 2023)."""

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

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class _Output(nn.Module):
    """The UNet's output without its learned variance: x_t, t -> (B,3,H,W)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.unet(x_t, t, return_dict=False)[0]
        return output[:, :3]


class UnconditionalDenoiser:
    """A diffusion model's estimate of x_0 at the timestep that matches sigma (arXiv 2206.10550).

    The timestep is the first whose noise is not weaker than sigma. Scale and estimate use sigma
    itself, alpha_bar = 1 / (1 + (2 sigma)^2), not the alpha_bar of that timestep.
    """

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Tensor,
        prediction: str,
        runtime: Runtime | None = None,
    ) -> None:
        self._dtype = next(unet.parameters()).dtype
        self._output = (runtime or Torch()).prepare(_Output(unet).eval())
        self._prediction = prediction
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        ratios = noise_ratios(alphas_cumprod)
        self._ratios = ratios[ratios.isfinite()]  # A zero terminal SNR has no ratio.
        self.largest_sigma = float(self._ratios[-1]) / 2

    def __call__(self, x_hat: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser`; arithmetic outside the UNet keeps the dtype of `x_hat`."""
        sigma = sigma.cpu()
        t = timesteps(self._ratios, sigma).to(x_hat.device)
        alpha_bar = (1 / (1 + (2 * sigma) ** 2)).to(x_hat.device, x_hat.dtype)
        signal = alpha_bar.sqrt()[:, None, None, None]
        noise = (1 - alpha_bar).sqrt()[:, None, None, None]
        x_t = (2 * x_hat - 1) * signal
        output = self._output(x_t.to(self._dtype), t).to(x_hat.dtype)
        if self._prediction == "epsilon":
            x_0 = (x_t - noise * output) / signal
        elif self._prediction == "v_prediction":
            x_0 = signal * x_t - noise * output
        else:
            x_0 = output
        return (x_0.clamp(-1, 1) + 1) / 2


def load_unconditional(
    folder: Path,
    states: Any,
    k: float,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    adapter: Path | None = None,
) -> Denoiser:
    """A denoiser from a `UNet2DModel` in `unet/` and its scheduler's settings in `scheduler/`.

    `states`, `k` and `adapter` do not matter. Raises ValueError for a UNet with other than 3
    channels, with classes, or without a timestep, and for a scheduler without alpha_bar.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    where = folder / "unet"
    check_room(f"{folder.name}'s UNet", bytes_of(where, UNET, dtype.itemsize), device)
    unet, found = UNet2DModel.from_pretrained(
        where,
        torch_dtype=dtype,
        variant=hold(where, Network("", "config.json", UNET)).variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ValueError(f"{where}: the weights lack {len(absent)} of the UNet's, as {absent[0]}")
    config = unet.config
    if config.in_channels != 3 or config.out_channels not in (3, 6) or config.num_class_embeds:
        raise ValueError(
            f"{where}: takes {config.in_channels} channels, gives {config.out_channels} and has "
            f"{config.num_class_embeds or 'no'} classes; it must take 3, give 3 or 6 and have none"
        )
    if config.time_embedding_type != "positional":
        raise ValueError(f"{where}: embeds a {config.time_embedding_type} noise level, no timestep")
    settings = DDPMScheduler.load_config(folder / "scheduler", local_files_only=True)
    prediction = settings.get("prediction_type", "epsilon")
    if "beta_schedule" not in settings or prediction not in PREDICTIONS:
        raise ValueError(
            f"{folder / 'scheduler'}: {settings.get('_class_name')} predicts {prediction}; it must "
            f"have a beta_schedule and predict one of {', '.join(PREDICTIONS)}"
        )
    alphas_cumprod: Tensor = DDPMScheduler.from_config(settings).alphas_cumprod
    unet = unet.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    return UnconditionalDenoiser(unet, alphas_cumprod, prediction, runtime)
