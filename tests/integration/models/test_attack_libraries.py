"""AutoAttack and foolbox on a classifier alone; skipped without the extra `bench`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.bundle import DEFAULT_TASK, read_bundle
from models.evaluation.attacks.grid import distance
from models.evaluation.attacks.libraries import autoattack, foolbox_pgd
from models.evaluation.attacks.pgd import pgd
from models.evaluation.attacks.pipeline import undefended
from models.evaluation.attacks.registry import PACKAGES, Strength, Target, attacked
from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice
from models.runtime import Torch
from models.smoothing import SmoothedModel, load

CPU = torch.device("cpu")
needs: dict[str, Any] = {
    package: pytest.mark.skipif(
        find_spec(package) is None, reason=f"{package}, of the extra bench, is not installed"
    )
    for package in PACKAGES.values()
}
# foolbox 3.3.4 imports a deprecated module of SciPy.
pytestmark = pytest.mark.filterwarnings("ignore:.*scipy.ndimage.*:DeprecationWarning")


@pytest.fixture(scope="module")
def nano() -> SmoothedModel:
    return load(read_bundle(DEFAULT_TASK), dtype=torch.float32, cpu_threads=0, runtime=Torch())


def target(nano: SmoothedModel, index: int) -> Target:
    data = evaluation_slice(SLICE)
    pixels = np.ascontiguousarray(data.images[index].transpose(2, 0, 1))
    return Target(nano, None, pixels, int(data.labels[index]), index)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs[package]) for name, package in PACKAGES.items()]
)
def test_a_package_breaks_the_head_within_the_ball(nano: SmoothedModel, name: str) -> None:
    """It finds another label at most eps away, the same again, and spares torch's generator."""
    attacked_image, strength = target(nano, 1), Strength(0.25, 20, 1, 1, seed=0)
    torch.manual_seed(5)
    found = attacked(name, attacked_image, strength)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), following)
    assert 0 < distance(attacked_image.pixels, found) <= 0.25
    with torch.no_grad():
        logits = nano.classifier(torch.tensor(found)[None] / 255)
    assert int(logits.argmax()) != attacked_image.label
    assert np.array_equal(attacked(name, attacked_image, strength), found)


@needs["foolbox"]
def test_foolbox_descends_as_far_as_pgd(nano: SmoothedModel) -> None:
    """Two implementations of the same attack reach about the same loss, far above the clean one."""
    for index in (1, 4):
        mine, strength = target(nano, index), Strength(0.25, 40, 1, 1, seed=0)
        head = undefended(nano.classifier, mine.pixels.shape, CPU)
        theirs = foolbox_pgd(nano.classifier, mine.x, mine.label, 0.25, 0, 40)
        ours = pgd(head, mine.x, mine.label, 0.25, 40, mine.key(strength, "start"))
        clean, *losses = (head.loss(x, mine.label) for x in (mine.x, theirs, ours))
        assert losses[0] == pytest.approx(losses[1], rel=0.15)
        assert losses[1] > clean + 4


@needs["pyautoattack"]
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_autoattack_of_few_classes(classes: int) -> None:
    """Fewer classes than its standard version aims at are no obstacle."""

    class Few:
        labels = tuple("abcd"[:classes])

        def __call__(self, x: Tensor) -> Tensor:
            means = x.mean((2, 3))
            logits = torch.cat([means, -means[:, :1]], 1) * 20
            return logits[:, :classes]

    x = torch.full((3, 8, 8), 0.5)
    x[0] = 0.52
    found = autoattack(Few(), x, 0, 1.0, seed=0)
    assert int(Few()(found[None]).argmax()) != 0
    assert 0 < float((found - x).norm()) <= 1.0 + 1e-5
