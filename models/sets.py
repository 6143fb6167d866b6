"""Sets of base networks that a task can be adapted from: a text-to-image cascade and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.bundle import MODELS
from models.nano.captions import DEFAULT_TEMPLATE, vocabulary


@dataclass(frozen=True, slots=True)
class DenoiserSet:
    """Both stages of a cascade, of which the second denoises; folders in DeepFloyd's layout.

    `stage1` and `stage2` are absolute or relative to this package; `resolution` is in pixels,
    `largest_sigma` in [0,1] pixel units. `tokens` counts a prompt's, of which the text encoder
    reads `prompt_tokens` at most. `classifier` names the set it is used with by default, `shots`,
    `steps` and `epochs` are its adaptation's defaults. `words` are all that it was trained on, or
    None for any.
    """

    stage1: str
    stage2: str
    resolution: int
    largest_sigma: float
    k: float
    template: str
    licence: str
    prompt_tokens: int
    tokens: Callable[[str], int]
    classifier: str
    shots: int
    steps: int
    epochs: int
    words: tuple[str, ...] | None = None

    @property
    def folders(self) -> tuple[Path, Path]:
        """Stage I's folder and stage II's."""
        return MODELS / self.stage1, MODELS / self.stage2


@dataclass(frozen=True, slots=True)
class ClassifierSet:
    """A classifier of `kind` (a key of CLASSIFIERS) from a folder, absolute or relative to this
    package; a label's prompt has `prompt_tokens` tokens at most, 0 where none are made."""

    kind: str
    folder: str
    licence: str
    prompt_tokens: int
    tokens: Callable[[str], int]


def _bytes_and_end(prompt: str) -> int:
    """ByT5's tokens of a prompt: its UTF-8 bytes, and one for the end."""
    return len(prompt.encode()) + 1


_NANO_LICENCE = "Apache-2.0; trained on CIFAR-10 (Krizhevsky 2009)"

DENOISER_SETS = {
    "nano": DenoiserSet(
        stage1="nano/weights/stage1",
        stage2="nano/weights/stage2",
        resolution=32,
        largest_sigma=1.0,
        k=1.8,
        template=DEFAULT_TEMPLATE,
        licence=_NANO_LICENCE,
        prompt_tokens=77,
        tokens=_bytes_and_end,
        classifier="nano",
        shots=4,
        steps=300,
        epochs=10,
        words=vocabulary(),
    ),
}
"""Where to add a cascade: one entry, and its profile in adaptation/profiles.py."""

CLASSIFIER_SETS = {
    "nano": ClassifierSet(
        kind="open-clip",
        folder="nano/weights/head",
        licence=_NANO_LICENCE,
        prompt_tokens=64,
        tokens=_bytes_and_end,
    ),
}
"""Where to add a classifier that tasks are adapted with."""
