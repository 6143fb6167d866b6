"""Networks of one's own: registered under a name below the models directory; without torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from models.files import BundleError
from models.zoo.registry import (
    CLASSIFIER_SETS,
    DENOISER_SETS,
    ClassifierSet,
    DenoiserSet,
)

OWN = "own"
"""The folder of registered networks, below the models directory."""
REGISTRATION = "registration.json"
CLASSIFIER, DENOISER = "classifier", "denoiser"
"""Folders of a registration's networks."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ANY_TOKENS = 0


def folder_of(models_dir: Path, name: str) -> Path:
    """The folder of a name's networks; raises ValueError for a name that may not be registered."""
    taken = {"default", *DENOISER_SETS, *CLASSIFIER_SETS, "none"}
    if _NAME.fullmatch(name) is None or name in taken:
        raise ValueError(
            f"the name {name!r} cannot be registered: it must have 1 to 64 letters, digits, - and "
            f"_, begin with a letter or digit, and be none of {', '.join(sorted(taken))}"
        )
    return models_dir.resolve() / OWN / name


@dataclass(frozen=True, slots=True)
class Registration:
    """The networks that a name stands for, as a new task may be adapted from them.

    `labels` are the classifier's, or None where it takes any words. `denoiser` is the kind of the
    registered denoiser, or None where only a classifier was registered. `resolution` is in pixels.
    """

    classifier: str
    labels: tuple[str, ...] | None
    denoiser: str | None
    resolution: int
    largest_sigma: float
    k: float
    template: str

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The registration in a name's folder, or None; raises BundleError for a damaged one."""
        path = folder / REGISTRATION
        try:
            described: dict[str, Any] = json.loads(path.read_text())
            labels = described.pop("labels")
            return cls(**described, labels=None if labels is None else tuple(labels))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{path}: cannot be read: {error}") from error

    def document(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def classifier_set(name: str, models_dir: Path) -> ClassifierSet | None:
    """A registered name's classifier for adapted tasks, or None for an unknown name."""
    folder = _registered(name, models_dir)
    if folder is None or (found := Registration.read(folder)) is None:
        return None
    return ClassifierSet(
        kind=found.classifier,
        folder=str(folder / CLASSIFIER),
        licence=f"{name}'s classifier: as its maker licenses it",
        prompt_tokens=_ANY_TOKENS,
        tokens=None,
        files=("**/*",),
        labels=found.labels,
    )


def denoiser_set(name: str, models_dir: Path) -> DenoiserSet | None:
    """A registered name's cascade for adapted tasks, or None for an unknown name.

    Raises ValueError where the name has no cascade, since pictures are made by its first stage.
    """
    folder = _registered(name, models_dir)
    if folder is None or (found := Registration.read(folder)) is None:
        return None
    if found.denoiser != "super-resolution":
        raise ValueError(
            f"{name} has {found.denoiser or 'no denoiser'}; a task is adapted from a cascade "
            "(super-resolution), whose first stage makes pictures from words"
        )
    stage1 = folder / DENOISER / "stage1"
    return DenoiserSet(
        stage1=str(stage1),
        stage2=str(folder / DENOISER / "stage2"),
        resolution=found.resolution,
        largest_sigma=found.largest_sigma,
        k=found.k,
        template=found.template,
        licence=f"{name}'s denoiser: as its maker licenses it",
        prompt_tokens=77,
        tokens=_left_to_the_job,
        classifier=name,
        shots=1,
        steps=500,
        epochs=10,
    )


def _left_to_the_job(stage1: Path, prompt: str) -> int:
    """0: tokenizers differ, and the text encoder's own counts as the job begins."""
    return 0


def _registered(name: str, models_dir: Path) -> Path | None:
    try:
        return folder_of(models_dir, name)
    except ValueError:
        return None


SETS = {"denoiser": denoiser_set, "classifier": classifier_set}
"""Finders of a registered name's networks, by the field that has the name."""
