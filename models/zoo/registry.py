"""Sets of base networks that a task can be adapted from: a text-to-image cascade and a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.bundle import MODELS
from models.nano.captions import BLANK, DEFAULT_TEMPLATE, vocabulary
from models.zoo.sources import CLIP_LICENCE, DEEPFLOYD_LICENCE, SOURCES

Tokens = Callable[[Path, str], int]
"""Counts a prompt's tokens for the network in a folder."""


@dataclass(frozen=True, slots=True)
class DenoiserSet:
    """Both stages of a cascade, of which the second denoises; folders in DeepFloyd's layout.

    `stage1` and `stage2` are absolute, relative to this package, or of SOURCES and then relative to
    the models directory. `resolution` is in pixels, `largest_sigma` in [0,1] pixel units. `tokens`
    counts a prompt's tokens, of which the text encoder reads at most `prompt_tokens`. `classifier`
    names the classifier set used by default. `shots` (fewer for very many labels), `steps` and
    `epochs` are the adaptation's defaults. `identifier` stands in the personalized prompt (Ruiz et
    al. 2023). `words` are all the words of the training, or None for any.
    """

    stage1: str
    stage2: str
    resolution: int
    largest_sigma: float
    k: float
    template: str
    licence: str
    prompt_tokens: int
    tokens: Tokens
    classifier: str
    shots: int
    steps: int
    epochs: int
    identifier: str = "sks"
    words: tuple[str, ...] | None = None

    @property
    def folders(self) -> tuple[Path, Path]:
        """Stage I's folder and stage II's."""
        return MODELS / self.stage1, MODELS / self.stage2

    @property
    def fetched(self) -> tuple[str, ...]:
        """The folders that do not ship with the package."""
        return tuple(folder for folder in (self.stage1, self.stage2) if folder in SOURCES)

    def below(self, models_dir: Path | None) -> DenoiserSet:
        """The set with absolute folders in place of fetched ones."""
        stage1, stage2 = (_located(folder, models_dir) for folder in (self.stage1, self.stage2))
        return replace(self, stage1=stage1, stage2=stage2)


@dataclass(frozen=True, slots=True)
class ClassifierSet:
    """A classifier of `kind` (a key of CLASSIFIERS) from a folder, given as in `DenoiserSet`.

    `files` are patterns of the files read from the folder. A label's prompt has at most
    `prompt_tokens` tokens, 0 where no prompts are made. `tokens` is None where only the network's
    own tokenizer can count them; the job then does so first. `labels` are those of a network with
    fixed classes, or None where it takes any words.
    """

    kind: str
    folder: str
    licence: str
    prompt_tokens: int
    tokens: Tokens | None
    files: tuple[str, ...] = ("*",)
    labels: tuple[str, ...] | None = None

    @property
    def fetched(self) -> tuple[str, ...]:
        """The folder, where it does not ship with the package."""
        return (self.folder,) if self.folder in SOURCES else ()

    def below(self, models_dir: Path | None) -> ClassifierSet:
        """The set with an absolute folder in place of a fetched one."""
        return replace(self, folder=_located(self.folder, models_dir))


def _located(folder: str, models_dir: Path | None) -> str:
    if folder not in SOURCES:
        return folder
    if models_dir is None:
        raise ValueError(f"{folder} is a fetched folder, and no models directory was given")
    return str(models_dir.resolve() / folder)


def _bytes_and_end(folder: Path, prompt: str) -> int:
    """ByT5's number of tokens of a prompt: its UTF-8 bytes, and one for the end."""
    return len(prompt.encode()) + 1


def _pieces_and_end(stage1: Path, prompt: str) -> int:
    """T5's number of tokens of a prompt in lower case: its pieces, and one for the end."""
    model = stage1 / "tokenizer" / "spiece.model"
    return len(_sentencepiece(model, model.stat().st_mtime_ns).encode(prompt.lower())) + 1


@lru_cache(4)
def _sentencepiece(model: Path, changed: int) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(model))


_NANO_LICENCE = "Apache-2.0; trained on CIFAR-10 (Krizhevsky 2009)"

_IF_II_L = DenoiserSet(
    stage1="if-ii-l/stage1",
    stage2="if-ii-l/stage2",
    resolution=224,
    largest_sigma=1.0,
    k=1.8,
    template=DEFAULT_TEMPLATE,
    licence=DEEPFLOYD_LICENCE,
    prompt_tokens=77,
    tokens=_pieces_and_end,
    classifier="clip-vit-b-32",
    shots=1,
    steps=500,
    epochs=10,
)
"""DeepFloyd IF-I-XL and IF-II-L with the paper's settings (method.md 5)."""

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
        shots=64,
        steps=100,
        epochs=20,
        identifier=BLANK,
        words=vocabulary(),
    ),
    "if-ii-l": _IF_II_L,
    "if-ii-l-96": replace(_IF_II_L, resolution=96),
}
"""The place to add a cascade: one entry, and its profile in adaptation/profiles.py."""

CLASSIFIER_SETS = {
    "nano": ClassifierSet(
        kind="open-clip",
        folder="nano/weights/head",
        licence=_NANO_LICENCE,
        prompt_tokens=64,
        tokens=_bytes_and_end,
    ),
    "clip-vit-b-32": ClassifierSet(
        kind="open-clip",
        folder="clip-vit-b-32",
        licence=CLIP_LICENCE,
        prompt_tokens=77,
        tokens=None,
        files=("open_clip_config.json", "*.safetensors"),
    ),
}
"""The place to add a classifier for adapted tasks."""
