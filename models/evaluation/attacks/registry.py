"""Every attack, from an image of the grid to an attacked image of the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.evaluation.attacks.grid import rounded, rounded_linf
from models.evaluation.attacks.libraries import autoattack, foolbox_pgd
from models.evaluation.attacks.pgd import pgd, pgd_linf, random_noise
from models.evaluation.attacks.pipeline import Pipeline, purified, smoothed, undefended
from models.evaluation.tables import noise_key
from models.purification.purifier import Purifier
from models.smoothing import SmoothedModel


@dataclass(frozen=True, slots=True)
class Strength:
    """How hard an attack tries: `eps` in [0,1] units, steps, and `rows` noise rows a step.

    eps is l2, and l_inf for LINF_ATTACKS.
    `batch_rows` of them have their activations in memory together. Noise and start follow from
    `seed` and the image's index.
    """

    eps: float
    steps: int
    rows: int
    batch_rows: int
    seed: int


@dataclass(frozen=True, slots=True)
class Target:
    """One image (3,H,W) uint8 with its true label, and the float32 networks to attack it on.

    `sigma` is None for the classifier alone, and behind a `purifier`. `index` is the image's place
    in its set.
    """

    model: SmoothedModel
    sigma: float | None
    pixels: NDArray[np.uint8]
    label: int
    index: int
    purifier: Purifier | None = None

    @property
    def x(self) -> Tensor:
        """The image in [0,1] units, float32, on the networks' device."""
        return torch.tensor(self.pixels, device=self.model.device) / 255

    def key(self, strength: Strength, domain: str) -> bytes:
        """A key of attacks alone: no certificate's domain has such a name."""
        return noise_key(strength.seed, self.index, f"attack {domain}")

    def seed(self, strength: Strength) -> int:
        """A seed of 32 bits for a package's generator."""
        return int.from_bytes(self.key(strength, "start")[:4], "big")

    def head(self) -> Pipeline:
        """The classifier alone."""
        return undefended(self.model.classifier, self.pixels.shape, self.model.device)

    def pipeline(self, strength: Strength, *, fresh: bool = False) -> Pipeline:
        """What classifies the image: smoothed, purified, or the classifier alone."""
        if self.purifier is not None:
            return purified(
                self.purifier,
                key=self.key(strength, "rows"),
                rows=strength.rows,
                batch_rows=strength.batch_rows,
                fresh=fresh,
            )
        if self.sigma is None:
            return self.head()
        return smoothed(
            self.model,
            self.sigma,
            self.pixels.shape,
            self.model.device,
            key=self.key(strength, "rows"),
            rows=strength.rows,
            batch_rows=strength.batch_rows,
            fresh=fresh,
        )


Ascent = Callable[[Pipeline, Tensor, int, float, int, bytes], Tensor]
Attack = Callable[[Target, Strength], Tensor]
"""The attacked image (3,H,W) in [0,1], at most eps from the target's."""


def _pgd(target: Target, strength: Strength) -> Tensor:
    return _ascended(target, strength, target.pipeline(strength))


def _eot(target: Target, strength: Strength) -> Tensor:
    return _ascended(target, strength, target.pipeline(strength, fresh=True))


def _pgd_linf(target: Target, strength: Strength) -> Tensor:
    return _ascended(target, strength, target.pipeline(strength), pgd_linf)


def _eot_linf(target: Target, strength: Strength) -> Tensor:
    return _ascended(target, strength, target.pipeline(strength, fresh=True), pgd_linf)


def _transfer(target: Target, strength: Strength) -> Tensor:
    return _ascended(target, strength, target.head())


def _ascended(
    target: Target, strength: Strength, pipeline: Pipeline, ascent: Ascent = pgd
) -> Tensor:
    key = target.key(strength, "start")
    return ascent(pipeline, target.x, target.label, strength.eps, strength.steps, key)


def _random(target: Target, strength: Strength) -> Tensor:
    key, pipeline = target.key(strength, "start"), target.pipeline(strength)
    return random_noise(pipeline, target.x, target.label, strength.eps, strength.steps, key)


def _autoattack(target: Target, strength: Strength) -> Tensor:
    x, classifier = target.x, target.model.classifier
    return autoattack(classifier, x, target.label, strength.eps, target.seed(strength))


def _foolbox_pgd(target: Target, strength: Strength) -> Tensor:
    x, classifier, seed = target.x, target.model.classifier, target.seed(strength)
    return foolbox_pgd(classifier, x, target.label, strength.eps, seed, strength.steps)


ATTACKS: dict[str, Attack] = {
    "pgd": _pgd,
    "eot": _eot,
    "pgd-linf": _pgd_linf,
    "eot-linf": _eot_linf,
    "transfer": _transfer,
    "random": _random,
    "autoattack": _autoattack,
    "foolbox-pgd": _foolbox_pgd,
}
"""The place to add an attack.

pgd has the same rows in every step, eot fresh ones. transfer attacks the classifier alone, whatever
the target is; random takes the worst of as many random changes as there are steps. The rest are
those of packages.
"""

LINF_ATTACKS = frozenset({"pgd-linf", "eot-linf"})
"""Attacks whose eps is l_inf."""

WITHOUT_GRADIENTS = frozenset({"random"})
"""Attacks that networks of every kind allow."""

PACKAGES = {"autoattack": "pyautoattack", "foolbox-pgd": "foolbox"}
"""Attacks of undefended classifiers only, with the packages that they need."""


def attacked(name: str, target: Target, strength: Strength) -> NDArray[np.uint8]:
    """The image (3,H,W) that the attack of this name finds, at most eps from the target's.

    Raises ValueError for networks without gradients, FloatingPointError for logits that are not
    finite.
    """
    found = ATTACKS[name](target, strength).detach().cpu().numpy()
    onto_grid = rounded_linf if name in LINF_ATTACKS else rounded
    return onto_grid(target.pixels, found, strength.eps)
