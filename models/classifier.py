"""Classifiers: from images in [0,1] to logits, each with its own resolution, scale and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.runtime import Runtime

if TYPE_CHECKING:
    import open_clip


class Classifier(Protocol):
    """x (B,3,H,W) float32 in [0,1] units -> logits (B,K) float32; `labels` name the K columns."""

    labels: tuple[str, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B,K) by row; rows do not affect one another."""


class Preprocess:
    """Bicubic resize with antialiasing, as CLIP's own, then the network's mean and deviation."""

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], like: Tensor
    ) -> None:
        self._size = size
        self._mean = torch.tensor(mean, device=like.device)[:, None, None]
        self._std = torch.tensor(std, device=like.device)[:, None, None]
        self._dtype = like.dtype

    @classmethod
    def of_open_clip(cls, model: open_clip.CLIP, dtype: torch.dtype) -> Preprocess:
        """The preprocessing of a CLIP's configuration, into `dtype`."""
        described: dict[str, Any] = model.visual.preprocess_cfg
        size = described["size"]
        like = torch.empty(0, dtype=dtype, device=model.logit_scale.device)
        side = size if isinstance(size, int) else size[-1]
        return cls(side, described["mean"], described["std"], like)

    @classmethod
    def of_timm(cls, model: nn.Module) -> Preprocess:
        """The preprocessing of a timm network's configuration, into its own dtype."""
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        side = config["input_size"][-1]
        return cls(side, config["mean"], config["std"], next(model.parameters()))

    def __call__(self, x: Tensor) -> Tensor:
        """x (B,3,H,W) in [0,1] -> the network's input."""
        if x.shape[-2:] != (self._size, self._size):
            x = F.interpolate(x, size=(self._size,) * 2, mode="bicubic", antialias=True)
        scaled = (x - self._mean.to(x.dtype)) / self._std.to(x.dtype)
        return scaled.to(self._dtype)


class OpenClipClassifier:
    """Zero-shot CLIP: cosine similarity to each label's prompt, times exp(logit scale).

    Text features are computed once from `template.format(label)`; the text tower is then released.
    Source: method.md 1.7.
    """

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
        self._visual = runtime.prepare(
            model.visual.to(dtype=dtype, memory_format=torch.channels_last)
        )
        self._preprocess = Preprocess.of_open_clip(model, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        features = F.normalize(self._visual(self._preprocess(x)).float(), dim=-1)
        # Row by row: a product of several may round each by its place (docs/decisions/0001).
        return torch.stack([self._prototypes.mv(row) for row in features])


class TimmClassifier:
    """A timm network with its own normalization, resolution and labels."""

    def __init__(self, model: nn.Module, labels: Sequence[str], runtime: Runtime) -> None:
        self.labels = tuple(labels)
        self._model = runtime.prepare(model)
        self._preprocess = Preprocess.of_timm(model)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        logits: Tensor = self._model(self._preprocess(x)).float()
        return logits


def open_clip_tokens(folder: Path, prompts: Sequence[str]) -> list[int]:
    """Each prompt's number of tokens for a CLIP's tokenizer, which would truncate longer ones."""
    import open_clip

    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return [len(tokenizer.encode(prompt)) + 2 for prompt in prompts]
    return [len(tokenizer.tokenizer(prompt).input_ids) for prompt in prompts]


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


def read_timm(folder: Path, labels: Sequence[str], tuned: Path | None = None) -> nn.Module:
    """A timm network in float32, from a folder with timm's `config.json` and `model.safetensors`.

    Weights in a `tuned` file replace the folder's. Raises ValueError where `labels` differ from the
    configuration's `label_names`.
    """
    import timm

    import models.zoo.vision  # noqa: F401 - registers its towers with timm

    described = json.loads((folder / "config.json").read_text())
    own = tuple(described.get("label_names") or ())
    if own != tuple(labels):
        raise ValueError(f"{folder}: the network's labels are {own}, the task's {tuple(labels)}")
    model = timm.create_model(
        described["architecture"],
        num_classes=described["num_classes"],
        pretrained_cfg_overlay=described["pretrained_cfg"],
        **described.get("model_args", {}),
    )
    model.load_state_dict(load_file(tuned or folder / "model.safetensors"))
    return model.eval()


def load_timm(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    tuned: Path | None = None,
) -> Classifier:
    """A classifier of `read_timm`'s network; `template` is not used."""
    model = read_timm(folder, labels, tuned).requires_grad_(False)
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    return TimmClassifier(model, labels, runtime)


Loader = Callable[
    [Path, Sequence[str], str, torch.device, torch.dtype, Runtime, Path | None], Classifier
]
CLASSIFIERS: dict[str, Loader] = {
    "open-clip": load_open_clip,
    "timm": load_timm,
}
"""The place to add a classifier: one adapter above and one line here."""
