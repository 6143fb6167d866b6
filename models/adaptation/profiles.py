"""How each denoiser set is adapted: sampling, personalization and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.adaptation.finetune import Finetuning
from models.adaptation.personalize import Personalization
from models.adaptation.synthesize import Sampling
from models.training import Profile


@dataclass(frozen=True)
class Adaptation:
    """One set's ways; `dtypes` of the resting networks on a CPU and on a GPU."""

    sampling: Sampling
    personalization: Personalization
    finetuning: Finetuning
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.bfloat16)

    def dtype(self, device: torch.device) -> torch.dtype:
        """What the resting networks compute in there."""
        return self.dtypes[device.type != "cpu"]


ADAPTATIONS = {
    "nano": Adaptation(
        Sampling(),
        Personalization(
            Profile(steps=300, batch=24, learning_rate=1e-4, log_every=10, checkpoint_every=50),
            weight=0.003,
            timesteps=(60, 760),
            guided_below=600,
        ),
        Finetuning(
            Profile(steps=0, batch=0, learning_rate=1e-5, log_every=5, checkpoint_every=10),
            sigmas=(0.12, 0.75),
        ),
    ),
}
"""Where to add a cascade's profile."""
