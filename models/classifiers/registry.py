"""Every kind of classifier, with its loader and its reader of a folder's description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from models import kinds
from models.classifiers import open_clip, transformers
from models.classifiers.base import Description, Loader
from models.classifiers.onnx import describe_onnx, load_onnx
from models.classifiers.open_clip import describe_open_clip, load_open_clip
from models.classifiers.timm import describe_timm, load_timm
from models.classifiers.transformers import describe_transformers, load_transformers

CLASSIFIERS: dict[str, Loader] = {
    "onnx": load_onnx,
    "open-clip": load_open_clip,
    "timm": load_timm,
    "transformers": load_transformers,
}
"""The place to add a classifier: a module beside this one, and one line here and in `kinds`."""

DESCRIPTIONS: dict[str, Callable[[Path], Description]] = {
    "onnx": describe_onnx,
    "open-clip": describe_open_clip,
    "timm": describe_timm,
    "transformers": describe_transformers,
}
"""Readers of what a folder says of itself; a kind without one has all said by its user."""

PROMPT_TOKENS: dict[str, Callable[[Path, Sequence[str]], tuple[list[int], int]]] = {
    "open-clip": open_clip.prompt_tokens,
    "transformers": transformers.prompt_tokens,
}
"""Of kinds with zero-shot heads: the tokens of each prompt, and the most that are read."""


def classifier_loader(kind: str) -> Loader:
    """The loader of a kind, an installed package's included; raises KeyError for an unknown one."""
    if kind in CLASSIFIERS:
        return CLASSIFIERS[kind]
    loader: Loader = kinds.installed(kinds.CLASSIFIER_GROUP)[kind].load()
    return loader
