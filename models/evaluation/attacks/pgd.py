"""Attacks in the l2 or l_inf ball around an image: projected gradient descent, and random noise.

Images x (3,H,W) are in [0,1] units, and so is eps. All randomness follows from a key.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.evaluation.attacks.pipeline import Pipeline

STEP_FACTOR = 4 / 3
"""The steps' lengths add up to this many eps (method.md 6)."""
LINF_STEP_FACTOR = 2.5
"""The same in the l_inf norm, where steps have a length in every pixel (Madry et al. 2018)."""


def pgd(pipeline: Pipeline, x: Tensor, label: int, eps: float, steps: int, key: bytes) -> Tensor:
    """An image at most eps (l2) from x, after `steps` steps up the loss of `label`.

    Madry et al. 2018, with steps of 4/3 eps / `steps` along the normalized gradient, from a random
    point of the ball. On a smoothed pipeline this is SmoothAdv. The last step's image is returned.
    """
    delta = _projected(_start(x, eps, key), x, eps)
    for step in range(steps):
        _, gradient = pipeline.gradient(x + delta, label, step)
        length = STEP_FACTOR * eps / steps
        delta = _projected(delta + length * _unit(gradient), x, eps)
    return x + delta


def pgd_linf(
    pipeline: Pipeline, x: Tensor, label: int, eps: float, steps: int, key: bytes
) -> Tensor:
    """The same in the l_inf ball, with steps of 2.5 eps / `steps` along the gradient's sign."""
    uniform = torch.tensor(_generator(key).uniform(-eps, eps, tuple(x.shape))).to(x)
    attacked = (x + uniform).clamp(0, 1)
    for step in range(steps):
        _, gradient = pipeline.gradient(attacked, label, step)
        moved = attacked + LINF_STEP_FACTOR * eps / steps * gradient.sign()
        attacked = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return attacked


def random_noise(
    pipeline: Pipeline, x: Tensor, label: int, eps: float, tries: int, key: bytes
) -> Tensor:
    """The image of largest loss among `tries` random ones at distance eps, cut to [0,1]."""
    generator = _generator(key)
    found = [(x + eps * _unit(_normal(generator, x))).clamp(0, 1) for _ in range(tries)]
    return max(found, key=lambda image: pipeline.loss(image, label))


def _start(x: Tensor, eps: float, key: bytes) -> Tensor:
    """A random direction with a length that is uniform in [0, eps]."""
    generator = _generator(key)
    return eps * generator.uniform() * _unit(_normal(generator, x))


def _generator(key: bytes) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(key, np.uint32))


def _normal(generator: np.random.Generator, like: Tensor) -> Tensor:
    return torch.tensor(generator.standard_normal(like.shape)).to(like)


def _unit(direction: Tensor) -> Tensor:
    """The direction at length 1; zero where it is zero."""
    length: Tensor = direction.norm()
    return direction / length.clamp(min=torch.finfo(direction.dtype).tiny)


def _projected(delta: Tensor, x: Tensor, eps: float) -> Tensor:
    """The change, shortened to eps, and then such that x with it lies in [0,1].

    The second only shortens, because x lies in [0,1].
    """
    length: Tensor = delta.norm()
    shortened = delta * (eps / length.clamp(min=eps))
    return (x + shortened).clamp(0, 1) - x
