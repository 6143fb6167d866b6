"""AutoAttack and foolbox, through their packages, on a classifier alone (the extra `bench`)."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from models.classifiers.base import Classifier
from models.evaluation.attacks.pgd import STEP_FACTOR

_TARGETS = 9
"""Labels that AutoAttack's standard version aims at, where there are as many others."""
_TARGETED_CLASSES = 4
"""The fewest classes of its targeted loss."""


class Logits(nn.Module):
    """A classifier as the packages take it: x (B,3,H,W) in [0,1] -> logits (B,K)."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """See the class; gradients have x's usual layout in memory, which AutoAttack demands."""
        return self._classifier(x.flatten(1).unflatten(1, x.shape[1:]))


def autoattack(classifier: Classifier, x: Tensor, label: int, eps: float, seed: int) -> Tensor:
    """What AutoAttack finds (Croce and Hein 2020, standard version, l2), else x (3,H,W) itself.

    With fewer than four classes, its targeted parts are replaced by the untargeted FAB.
    """
    from pyautoattack import AutoAttack

    others = len(classifier.labels) - 1
    is_standard = others + 1 >= _TARGETED_CLASSES
    attack = AutoAttack(
        Logits(classifier).eval(),
        norm="L2",
        eps=eps,
        seed=seed,
        device=x.device,
        version="standard" if is_standard else "custom",
        attacks=None if is_standard else ["apgd-ce", "fab", "square"],
    )
    attack.apgd_targeted.n_target_classes = min(_TARGETS, others)
    attack.fab.n_target_classes = min(_TARGETS, others)
    with _own_randomness(x):
        found: Tensor = attack.run_standard_evaluation(x[None].contiguous(), _labels(x, label))[0]
    return found[0]


def foolbox_pgd(
    classifier: Classifier, x: Tensor, label: int, eps: float, seed: int, steps: int
) -> Tensor:
    """An image (3,H,W) by foolbox's PGD in l2, with the steps of `pgd`: a check of the latter."""
    import foolbox

    model = foolbox.PyTorchModel(Logits(classifier).eval(), bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.L2PGD(rel_stepsize=STEP_FACTOR / steps, steps=steps)
    with _own_randomness(x):
        torch.manual_seed(seed)
        found: Tensor = attack(model, x[None], _labels(x, label), epsilons=eps)[0]
    return found[0]


def _labels(x: Tensor, label: int) -> Tensor:
    return torch.tensor([label], device=x.device)


def _own_randomness(x: Tensor) -> AbstractContextManager[None]:
    """A block whose draws leave torch's global generators as they were."""
    return torch.random.fork_rng([x.device] if x.is_cuda else [])
