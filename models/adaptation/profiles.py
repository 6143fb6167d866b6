"""Profiles of the denoiser sets' adaptations: sampling, personalization and fine-tuning."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.adaptation.finetune import Finetuning
from models.adaptation.personalize import Personalization
from models.adaptation.synthesize import Sampling
from models.runtime import name_of_dtype
from models.smoothing import best_dtype
from models.training import Profile


@dataclass(frozen=True)
class Adaptation:
    """One set's profile.

    The text encoder computes in `text_dtype`, because serving uses its states. Both stages' UNets
    compute in `dtype`, or where that is None in the device's best. The frozen classifier is in
    float32, and training runs under autocast to bfloat16.
    """

    sampling: Sampling
    personalization: Personalization
    finetuning: Finetuning
    text_dtype: torch.dtype = torch.float32
    dtype: torch.dtype | None = None

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """The dtype that the UNets of both stages compute in on a device."""
        return self.dtype or best_dtype(device)

    def described(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        described: dict[str, Any] = json.loads(json.dumps(asdict(self), default=name_of_dtype))
        return described


_IF_II_L = Adaptation(
    Sampling(steps=100, upscale_steps=50, chunk=4),
    Personalization(
        Profile(steps=500, batch=24, learning_rate=1e-4, log_every=10, checkpoint_every=50),
        micro_batch=4,
    ),
    Finetuning(
        Profile(steps=0, batch=0, learning_rate=5e-7, log_every=1, checkpoint_every=10),
        sigmas=(0.0, 1.0),
        micro_batch=16,
    ),
    text_dtype=torch.bfloat16,
    dtype=torch.bfloat16,
)
"""The paper's settings (method.md 5), and of diffusers' pipelines the numbers of steps."""

ADAPTATIONS = {
    "nano": Adaptation(
        Sampling(steps=15, upscale_steps=10),
        Personalization(
            Profile(steps=100, batch=24, learning_rate=1e-4, log_every=10, checkpoint_every=50),
            weight=0.003,
            timesteps=(60, 760),
            guided_below=600,
        ),
        Finetuning(
            Profile(steps=0, batch=0, learning_rate=1e-4, log_every=5, checkpoint_every=10),
            sigmas=(0.12, 0.75),
            soft_targets=True,
            mixing=0.35,
        ),
    ),
    "if-ii-l": _IF_II_L,
    "if-ii-l-96": _IF_II_L,
}
"""The place to add a cascade's profile."""


def adaptation_of(name: str) -> Adaptation:
    """The profile of a denoiser set; a registered cascade has the paper's."""
    return ADAPTATIONS.get(name, _IF_II_L)
