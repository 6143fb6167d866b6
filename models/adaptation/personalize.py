"""Personalization of the denoiser to a task's references: LoRA on its attention (method.md 5.2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.adaptation.references import References
from models.bundle import ADAPTER
from models.denoisers.super_resolution import NOISE_LEVELS, read_unet
from models.files import written_whole
from models.training import OnStep, Profile, disagreement, fit, forget_after, unheard

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
_HELD_BACK_STEP = -1
"""The step whose draws are used only for validation."""


@dataclass(frozen=True)
class Personalization:
    """Settings of the denoiser's adaptation; the plan's steps override `profile.steps`.

    `weight` is lambda, of the classifier's cross-entropy. Timesteps are drawn from `timesteps`, and
    rows below `guided_below` go to the classifier. `micro_batch` rows are in memory at once. With a
    `consistency` (eta) above 0, a reference's rows come in pairs, and the classifier's disagreement
    about a pair is added to its cross-entropy, eta times (Jeong & Shin, arXiv 2006.04062).
    """

    profile: Profile
    weight: float = 0.01
    consistency: float = 0.0
    rank: int = 4
    timesteps: tuple[int, int] = (0, 1000)
    guided_below: int = 1000
    micro_batch: int = 24
    validation_rows: int = 48

    @property
    def draws(self) -> int:
        """Noisy rows of a reference in a step."""
        return 2 if self.consistency else 1


def personalize(
    stage2: Path,
    references: References,
    states: Tensor,
    k: float,
    classifier: Callable[[Tensor], Tensor],
    settings: Personalization,
    out: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_step: OnStep = unheard,
) -> Path:
    """The safetensors file in `out` of an adapter trained for `stage2`.

    `states` (77,D) are the personalized prompt's. The loss is the noise's mean square error plus
    lambda times the cross-entropy of the frozen `classifier`, (B,3,H,W) in [0,1] -> logits (B,K),
    on the one-step estimate of x0 (Choi et al. 2024, Eq. 12), and the settings' disagreement. The
    base's weights are frozen in
    `dtype`; the adapter is trained in float32. Checkpoints, losses and validations lie in `out`;
    another call resumes from there, with the same losses.
    """
    from diffusers import DDPMScheduler
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = read_unet(stage2, dtype, device)
    scheduler: Any = DDPMScheduler.from_pretrained(stage2 / "scheduler", local_files_only=True)
    torch.manual_seed(seed)
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank,
            init_lora_weights="gaussian",
            target_modules=TARGETS,
        )
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    unet.to(device, memory_format=torch.channels_last)
    losses = _Losses(
        unet, scheduler.alphas_cumprod, references, states, k, classifier, settings, device, seed
    )
    validations = out / "validation.jsonl"

    def watch(step: int, whole: int, loss: float) -> None:
        if step % settings.profile.checkpoint_every == 0 or step == whole:
            forget_after(validations, step - 1)
            with validations.open("a") as stream:
                stream.write(json.dumps({"step": step, **losses.validated()}) + "\n")
        on_step(step, whole, loss)

    fit("personalize", unet, losses, out, settings.profile, device, on_step=watch)
    # Not diffusers' own saving: the order of its description changes with the process.
    learned = get_peft_model_state_dict(unet, adapter_name="default")
    weights = {name: tensor.cpu().contiguous() for name, tensor in learned.items()}
    with written_whole(out / ADAPTER) as partial:
        save_file(weights, partial)
    return out / ADAPTER


class _Losses:
    """A step's loss, in micro-batches, each weighted by its share of the rows."""

    def __init__(
        self,
        unet: nn.Module,
        alphas_cumprod: Tensor,
        references: References,
        states: Tensor,
        k: float,
        classifier: Callable[[Tensor], Tensor],
        settings: Personalization,
        device: torch.device,
        seed: int,
    ) -> None:
        parameter = next(unet.parameters())
        self._unet, self._dtype, self._device = unet, parameter.dtype, device
        self._alpha_bar = alphas_cumprod.float()
        self._references = references
        self._states = states.to(device, parameter.dtype)[None]
        self._k, self._classifier, self._settings, self._seed = k, classifier, settings, seed

    def __call__(self, step: int) -> Iterator[Tensor]:
        batch = self._settings.profile.batch
        for error, logits, labels, shown in self._seen(step, batch):
            named = F.cross_entropy(logits, labels, reduction="none")
            if self._settings.consistency:
                differing = disagreement(logits.unflatten(0, (-1, 2)).transpose(0, 1))
                named = named + self._settings.consistency * differing.repeat_interleave(2)
            yield (error + self._settings.weight * named * shown).sum() / batch

    @torch.no_grad()
    def validated(self) -> dict[str, float]:
        """The noise's error and the share of recognized rows, under held-back noise."""
        rows = self._settings.validation_rows
        errors, right, counted = 0.0, 0, 0
        for error, logits, labels, shown in self._seen(_HELD_BACK_STEP, rows):
            errors += float(error.sum())
            right += int(((logits.argmax(1) == labels) & shown).sum())
            counted += int(shown.sum())
        return {"error": round(errors / rows, 5), "recognised": round(right / max(1, counted), 4)}

    def _seen(self, step: int, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Micro-batches: each row's error (B,), logits (B,K), label (B,), and whether it counts."""
        settings, size = self._settings, self._references.images.shape[1:]
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step + 1)
        seen = batch // settings.draws
        chosen = torch.randint(len(self._references.labels), (seen,), generator=generator)
        t = torch.randint(*settings.timesteps, (seen,), generator=generator)
        noise = torch.randn(seen, settings.draws, *size, generator=generator)
        for part in torch.arange(seen).split(max(1, settings.micro_batch // settings.draws)):
            rows = part.repeat_interleave(settings.draws)
            yield self._row_by_row(chosen[rows], t[rows], noise[part].flatten(0, 1))

    def _row_by_row(
        self, chosen: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device = self._device
        pixels = (self._references.images[chosen].float() / 127.5 - 1).to(device)
        labels, noise = self._references.labels[chosen].to(device), noise.to(device)
        alpha_bar = self._alpha_bar[t][:, None, None, None].to(device)
        x_t = alpha_bar.sqrt() * pixels + (1 - alpha_bar).sqrt() * noise
        doubled = torch.cat([x_t, x_t], 1).to(self._dtype)
        output = self._unet(
            doubled.contiguous(memory_format=torch.channels_last),
            t.to(device),
            self._states.expand(len(x_t), -1, -1),
            class_labels=(self._k * t.float()).clamp(max=NOISE_LEVELS).to(device),
        )
        epsilon = output.sample[:, :3].float()
        error = (epsilon - noise).square().mean((1, 2, 3))
        x_0 = (x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        with torch.autocast(device.type, enabled=False):
            logits = self._classifier((x_0.clamp(-1, 1) + 1) / 2)
        return error, logits, labels, (t < self._settings.guided_below).to(device)
