"""Fine-tuning of the classifier on denoised references: all weights, in float32 (method.md 5.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from models.adaptation.references import References
from models.adaptation.tunables import Tunable
from models.bundle import TUNED
from models.denoisers.base import Denoiser
from models.files import written_whole
from models.training import OnStep, Profile, disagreement, fit, unheard


@dataclass(frozen=True)
class Finetuning:
    """Settings of the classifier's adaptation; `profile.steps` and `batch` follow from the
    references.

    Rows are denoised at a sigma drawn evenly between `sigmas`, in [0,1] pixel units. Their target
    is the reference's label, as in the paper. With `soft_targets` it is the unadapted classifier's
    softmax on the clean reference (Hinton et al., arXiv 1503.02531; its label alone is STAB of
    Salman et al., arXiv 2003.01908). The stored weights are the mean of unadapted and tuned ones,
    in which the tuned have the share `mixing`, in (0,1] (WiSE-FT, Wortsman et al., arXiv
    2109.01903). With a `consistency` (eta) above 0, a reference has two rows at its sigma, and the
    classifier's disagreement about them is added, eta times (Jeong & Shin, arXiv 2006.04062).
    """

    profile: Profile
    sigmas: tuple[float, float]
    largest_batch: int = 256
    micro_batch: int = 64
    soft_targets: bool = False
    mixing: float = 1.0
    consistency: float = 0.0


class _AtRest(nn.Module):
    """A network in evaluation mode during training: no dropout, no statistics of small batches."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> _AtRest:
        return super().train(False)


def finetune(
    classifier: Tunable,
    denoiser: Denoiser,
    references: References,
    settings: Finetuning,
    epochs: int,
    out: Path,
    device: torch.device,
    seed: int = 0,
    on_step: OnStep = unheard,
) -> Path:
    """The safetensors file in `out` of a classifier fine-tuned on denoised references.

    Minimizes the cross-entropy of the classifier behind the frozen `denoiser` (Choi et al. 2024,
    Eq. 13). Weights are in float32, because fewer bits lose a step at this learning rate.
    Checkpoints and losses lie in `out`; another call resumes from there, with the same losses.
    """
    whole = len(references.labels)
    network = _AtRest(classifier.network).train()
    resting = {name: tensor.clone() for name, tensor in classifier.network.state_dict().items()}
    targets = _targets(classifier, references, settings, device)
    batch = min(settings.largest_batch, whole)
    steps_an_epoch = -(-whole // batch)
    profile = replace(settings.profile, steps=epochs * steps_an_epoch, batch=batch)

    def losses(step: int) -> Iterator[Tensor]:
        epoch, place = divmod(step, steps_an_epoch)
        order = torch.randperm(whole, generator=_generator(seed, epoch, 0))
        chosen = order[place * batch : (place + 1) * batch]
        generator = _generator(seed, step, 1)
        for rows in chosen.split(settings.micro_batch):
            x_0 = _denoised(denoiser, references.images[rows], settings, generator, device)
            logits = classifier(x_0.flatten(0, 1)).unflatten(0, x_0.shape[:2])
            named = [F.cross_entropy(draw, targets[rows], reduction="sum") for draw in logits]
            differing = disagreement(logits).sum()
            loss = torch.stack(named).mean() + settings.consistency * differing
            yield loss / len(chosen)

    fit("finetune", network, losses, out, profile, device, on_step=on_step)
    weights = {
        name: resting[name].lerp(tensor, settings.mixing).cpu().float().contiguous()
        if tensor.is_floating_point()
        else tensor.cpu().contiguous()
        for name, tensor in classifier.network.state_dict().items()
    }
    with written_whole(out / TUNED) as partial:
        save_file(weights, partial)
    return out / TUNED


@torch.no_grad()
def _targets(
    classifier: Tunable, references: References, settings: Finetuning, device: torch.device
) -> Tensor:
    """Each reference's label (N,), or its shares of all labels (N,K)."""
    if not settings.soft_targets:
        return references.labels.to(device)
    batches = references.images.split(settings.micro_batch)
    return torch.cat([classifier(x.to(device).float() / 255).softmax(-1) for x in batches])


def _generator(seed: int, step: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * (seed * 1_000_003 + step) + stream)


@torch.no_grad()
def _denoised(
    denoiser: Denoiser,
    images: Tensor,
    settings: Finetuning,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Draws of noise on each image at its sigma, denoised (D,B,3,H,W)."""
    low, high = settings.sigmas
    sigma = low + (high - low) * torch.rand(len(images), generator=generator, dtype=torch.float64)
    draws = 2 if settings.consistency else 1
    noise = torch.randn(draws, *images.shape, generator=generator)
    x_hat = images.float() / 255 + sigma.float()[:, None, None, None] * noise
    with torch.autocast(device.type, enabled=False):
        x_0: Tensor = denoiser(x_hat.flatten(0, 1).to(device), sigma.repeat(draws))
    return x_0.reshape(x_hat.shape)
