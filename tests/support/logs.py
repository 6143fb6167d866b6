"""Certification logs of given votes, and the published ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import certified_radius
from models.evaluation.logs.reading import HEADER
from tests.support.paths import SHARED

CIFAR = "cifar10_cohen_resnet110_certified_sigma_"
IMAGENET = "imagenet_paper_certified_sigma_"


def published(name: str) -> Path:
    """The path of a published log; skips the test where it is not here."""
    path = SHARED / "oracles" / f"{name}.tsv"
    if not path.exists():
        pytest.skip(f"the certification log {path} is not here")
    return path


@cache
def radius_of(votes: int, n: int, sigma: float) -> float:
    """The radius of Cohen's rule at alpha = 0.001; 0 for an abstention."""
    return certified_radius(clopper_pearson_lower(votes, n, 0.001), sigma)


def write_log(path: Path, missed: Iterable[int], n: int, sigma: float) -> Path:
    """A log of images of label 3 that miss some of their n votes, printed as Cohen et al. do."""
    lines = []
    for index, each in enumerate(missed):
        radius = radius_of(n - each, n, sigma)
        predict = 3 if radius > 0 else -1
        lines.append(f"{index}\t3\t{predict}\t{radius:.3}\t{int(radius > 0)}\t0:00:01\n")
    path.write_text(HEADER + "".join(lines))
    return path
