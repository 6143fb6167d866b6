"""Zero-shot CLIP heads in open_clip's folder layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.classifiers.base import Classifier, Description, Preprocess, similarities
from models.runtime import Runtime

if TYPE_CHECKING:
    import open_clip


_CONTEXT = 77
"""open_clip's own default of a text tower's length."""


class OpenClipClassifier:
    """Zero-shot CLIP: cosine similarity to each label's prompt, times exp(logit scale).

    Text features are computed once from `template.format(label)`; the text tower is then released.
    Source: method.md 1.7.
    """

    bias = 0.0

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: Any,
        labels: Sequence[str],
        template: str,
        dtype: torch.dtype,
        runtime: Runtime,
    ) -> None:
        self.labels = tuple(labels)
        device = model.logit_scale.device
        words = tokenizer([template.format(label) for label in self.labels]).to(device)
        with torch.no_grad():
            text = model.encode_text(words, normalize=True)
            self._prototypes = model.logit_scale.exp() * text
        self._scale = model.logit_scale.detach()
        self._visual = runtime.prepare(
            model.visual.to(dtype=dtype, memory_format=torch.channels_last)
        )
        self._preprocess = preprocess_of(model, dtype)

    @property
    def scale(self) -> float:
        """What the cosines are multiplied by."""
        return float(self._scale.exp())

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        return similarities(self._visual(self._preprocess(x)), self._prototypes)


def preprocess_of(model: open_clip.CLIP, dtype: torch.dtype) -> Preprocess:
    """The preprocessing of a CLIP's configuration, into `dtype`."""
    described: dict[str, Any] = model.visual.preprocess_cfg
    like = torch.empty(0, dtype=dtype, device=model.logit_scale.device)
    mode = "bilinear" if described.get("interpolation") == "bilinear" else "bicubic"
    side = _side(described["size"])
    return Preprocess(side, described["mean"], described["std"], like, mode)


def describe_open_clip(folder: Path) -> Description:
    """The input's side; labels are words of any kind."""
    described = json.loads((folder / "open_clip_config.json").read_text())
    return Description(_side(described["model_cfg"]["vision_cfg"]["image_size"]), takes_words=True)


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else size[-1]


def open_clip_tokens(folder: Path, prompts: Sequence[str]) -> list[int]:
    """Each prompt's number of tokens for a CLIP's tokenizer, which would truncate longer ones."""
    import open_clip

    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return [len(tokenizer.encode(prompt)) + 2 for prompt in prompts]
    return [len(tokenizer.tokenizer(prompt).input_ids) for prompt in prompts]


def prompt_tokens(folder: Path, prompts: Sequence[str]) -> tuple[list[int], int]:
    """Each prompt's number of tokens, and the most that the text tower reads."""
    described = json.loads((folder / "open_clip_config.json").read_text())
    most = described["model_cfg"]["text_cfg"].get("context_length", _CONTEXT)
    return open_clip_tokens(folder, prompts), int(most)


def read_open_clip(
    folder: Path, device: torch.device, tuned: Path | None = None
) -> tuple[open_clip.CLIP, Any]:
    """A CLIP in float32 and its tokenizer; weights in a `tuned` file replace the folder's."""
    import open_clip

    import models.zoo.vision  # noqa: F401 - registers its towers with timm

    name = f"local-dir:{folder}"
    model: Any = open_clip.create_model(name, precision="fp32", device=device)
    if tuned is not None:
        model.load_state_dict(load_file(tuned))
    return model.eval(), open_clip.get_tokenizer(name)


def load_open_clip(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    tuned: Path | None = None,
) -> Classifier:
    """A CLIP from a folder with `open_clip_config.json` and `open_clip_model.safetensors`.

    Any label works: `template` turns it into a prompt. Weights in a `tuned` file replace the
    folder's.
    """
    model, tokenizer = read_open_clip(folder, device, tuned)
    return OpenClipClassifier(
        model.requires_grad_(False), tokenizer, labels, template, dtype, runtime
    )
