"""Image classifiers of transformers, and its CLIP and SigLIP as zero-shot heads.

A folder is as `save_pretrained` writes it, of the model, of its image processor and, for zero-shot
heads, of its tokenizer. Code in a folder is never run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.classifiers.base import (
    Classifier,
    Description,
    Preprocess,
    check_count,
    similarities,
)
from models.runtime import Runtime

ZERO_SHOT = ("CLIPModel", "SiglipModel")
"""The architectures whose labels are words."""
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_BILINEAR = 2
_PROBE_SIDE = 640
"""Side of the picture whose processing shows a network's input: larger than most inputs."""


class ImageLogits(nn.Module):
    """An `AutoModelForImageClassification`, from pixel values to logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B,K)."""
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


class ImageFeatures(nn.Module):
    """The image tower of a CLIP or SigLIP, from pixel values to features that are not normalized.

    The text tower is not a part of it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower = model.vision_model
        self.projection = getattr(model, "visual_projection", nn.Identity())

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features (B,D)."""
        features: Tensor = self.projection(self.tower(pixel_values=pixel_values).pooler_output)
        return features


class LogitsClassifier:
    """A network that gives logits itself, one a label."""

    def __init__(
        self, network: nn.Module, preprocess: Preprocess, labels: Sequence[str], runtime: Runtime
    ) -> None:
        self.labels = tuple(labels)
        self._network = runtime.prepare(network)
        self._preprocess = preprocess

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        return self._network(self._preprocess(x)).float()


class ZeroShotClassifier:
    """Cosine similarity to each label's prompt, times `scale`, and SigLIP's bias."""

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        labels: Sequence[str],
        runtime: Runtime,
    ) -> None:
        self.labels = tuple(labels)
        self._network = runtime.prepare(network)
        self._preprocess = preprocess
        self._text, self._bias = scale * text, bias
        self.scale, self.bias = float(scale), float(bias)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Classifier`."""
        return similarities(self._network(self._preprocess(x)), self._text) + self._bias


def is_zero_shot(folder: Path) -> bool:
    """Whether the folder holds a CLIP or SigLIP, whose labels are words."""
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or ()
    return any(name in ZERO_SHOT for name in architectures)


def describe_transformers(folder: Path) -> Description:
    """The input's side, and the labels where the configuration has more than numbers for them."""
    side, _, _, _ = _processing(folder)
    if is_zero_shot(folder):
        return Description(side, takes_words=True)
    named = json.loads((folder / "config.json").read_text()).get("id2label") or {}
    labels = tuple(named[key] for key in sorted(named, key=int))
    is_numbered = all(label == f"LABEL_{index}" for index, label in enumerate(labels))
    return Description(side, None if is_numbered else labels)


def preprocess_of(folder: Path, like: Tensor) -> Preprocess:
    """The preprocessing of a folder's image processor, into the dtype of `like`.

    Raises ValueError where the processor does more than resize, crop, scale and normalize.
    """
    side, mean, std, mode = _processing(folder)
    return Preprocess(side, mean, std, like, mode)


def _processing(folder: Path) -> tuple[int, list[float], list[float], str]:
    """Side of the input in pixels, mean and std in [0,1] units, and the mode of resizing."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(folder, **_LOCAL)
    picture = torch.randint(256, (3, _PROBE_SIDE, _PROBE_SIDE), dtype=torch.uint8)
    height, width = processor(picture, return_tensors="pt")["pixel_values"].shape[-2:]
    if height != width:
        raise ValueError(f"{folder}: the network takes {height}x{width} pixels, not a square")
    mean, std = (
        list(value) if processor.do_normalize else [neutral] * 3
        for value, neutral in ((processor.image_mean, 0.0), (processor.image_std, 1.0))
    )
    mode = "bilinear" if processor.resample == _BILINEAR else "bicubic"
    cropped = picture[:, :height, :width]
    theirs = processor(cropped, do_resize=False, do_center_crop=False, return_tensors="pt")
    ours = Preprocess(height, mean, std, torch.empty(0))(cropped[None] / 255)
    if not torch.allclose(ours, theirs["pixel_values"], rtol=0, atol=1e-4):
        raise ValueError(
            f"{folder}: {type(processor).__name__} does more than resize, crop, scale by 1/255 and "
            "normalize; export the network to ONNX with that in it"
        )
    return height, mean, std, mode


def read_logits(folder: Path, tuned: Path | None = None) -> ImageLogits:
    """The folder's image classifier in float32; weights in a `tuned` file replace the folder's."""
    from transformers import AutoModelForImageClassification

    return ImageLogits(_read(AutoModelForImageClassification, folder, tuned)).eval()


def read_zero_shot(folder: Path, tuned: Path | None = None) -> Any:
    """The folder's CLIP or SigLIP in float32; weights in a `tuned` file replace the folder's."""
    from transformers import AutoModel

    return _read(AutoModel, folder, tuned)


def _read(factory: Any, folder: Path, tuned: Path | None) -> Any:
    """Raises ValueError where weights are missing, which the library would draw at random."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # Of missing weights, it would only warn.
    model, found = factory.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **_LOCAL
    )
    model.eval()
    if absent := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ValueError(
            f"{folder}: the weights lack {len(absent)} of {type(model).__name__}'s, as {absent[0]}"
        )
    if tuned is not None:
        model.load_state_dict(load_file(tuned))
    return model


def tokenized(folder: Path, prompts: Sequence[str]) -> dict[str, Tensor]:
    """The prompts as the library's zero-shot pipeline gives them to the text tower."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    counts, limit = prompt_tokens(folder, prompts)
    for prompt, tokens in zip(prompts, counts, strict=True):
        if tokens > limit:
            raise ValueError(f"the prompt {prompt!r} has {tokens} tokens; the limit is {limit}")
    is_siglip = json.loads((folder / "config.json").read_text())["model_type"] == "siglip"
    ways: Any = {"padding": "max_length", "max_length": limit} if is_siglip else {"padding": True}
    return dict(tokenizer(list(prompts), return_tensors="pt", **ways))


def prompt_tokens(folder: Path, prompts: Sequence[str]) -> tuple[list[int], int]:
    """Each prompt's number of tokens, and the most that the text tower reads."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    config = AutoConfig.from_pretrained(folder, **_LOCAL)
    counts = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    return counts, int(config.text_config.max_position_embeddings)


def text_features(model: Any, words: dict[str, Tensor]) -> Tensor:
    """Normalized features (K,D) of tokenized prompts."""
    device = model.logit_scale.device
    inputs = {name: tensor.to(device) for name, tensor in words.items()}
    features: Tensor = model.get_text_features(**inputs).pooler_output
    return nn.functional.normalize(features, dim=-1)


def load_transformers(
    folder: Path,
    labels: Sequence[str],
    template: str,
    device: torch.device,
    dtype: torch.dtype,
    runtime: Runtime,
    tuned: Path | None = None,
) -> Classifier:
    """A classifier from a folder of transformers; weights in a `tuned` file replace the folder's.

    `template` turns a zero-shot head's labels into prompts. Raises ValueError for another number of
    labels than classes, a prompt that the text tower would cut, and an image processor that does
    more than `preprocess_of` can.
    """
    preprocess = preprocess_of(folder, torch.empty(0, dtype=dtype, device=device))
    network: nn.Module
    if not is_zero_shot(folder):
        network = read_logits(folder, tuned).requires_grad_(False)
        check_count(folder, network.model.config.num_labels, labels)  # type: ignore[union-attr, arg-type]
        return LogitsClassifier(network.to(device, dtype), preprocess, labels, runtime)
    model = read_zero_shot(folder, tuned).requires_grad_(False).to(device)
    with torch.no_grad():
        text = text_features(model, tokenized(folder, [template.format(each) for each in labels]))
    bias = getattr(model, "logit_bias", torch.zeros(1, device=device))
    network = ImageFeatures(model).to(dtype).eval()
    scale = model.logit_scale.exp()
    return ZeroShotClassifier(network, preprocess, text, scale, bias.float(), labels, runtime)
