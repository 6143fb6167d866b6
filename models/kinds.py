"""Kinds of networks: the files of each, and those that installed packages add; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

PROMPT_STATES = "prompt_states.safetensors"
"""A bundle's file that holds the prompt's states (77,D) as `states`."""
SAFETENSORS, ONNX = ".safetensors", ".onnx"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Files:
    """Patterns of the files in a network's folder: those that must match, and those that may."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_TOKENIZER = ("*token*.json", "vocab.*", "merges.txt", "*.model")
CLASSIFIER_FILES: Mapping[str, Files] = {
    "onnx": Files(("model.onnx", "model.json")),
    "open-clip": Files(("open_clip_config.json", "open_clip_model.safetensors"), _TOKENIZER),
    "timm": Files(("config.json", "model.safetensors")),
    "transformers": Files(
        ("config.json", "model*.safetensors", "*processor_config.json"),
        ("model.safetensors.index.json", *_TOKENIZER),
    ),
}
"""Every kind of classifier that a bundle may name, with the files in its folder."""

_UNET = ("unet/config.json", "unet/diffusion_pytorch_model*.safetensors", "scheduler/*.json")
_UNET_INDEX = "unet/diffusion_pytorch_model*.index*.json"
_TEXT = (
    "stage1/text_encoder/config.json",
    "stage1/text_encoder/model*.safetensors",
    "stage1/tokenizer/*",
)
_CASCADE = (
    *_TEXT,
    *(f"{stage}/{pattern}" for stage in ("stage1", "stage2") for pattern in _UNET),
    "stage2/image_noising_scheduler/*.json",
)
_CASCADE_INDICES = (
    "stage1/text_encoder/model*.index*.json",
    f"stage1/{_UNET_INDEX}",
    f"stage2/{_UNET_INDEX}",
)
DENOISER_FILES: Mapping[str, Files] = {
    "super-resolution": Files(_CASCADE, _CASCADE_INDICES),
    "unconditional": Files(_UNET, (_UNET_INDEX,)),
    "ffdnet": Files(("model.safetensors",)),
    "none": Files(),
}
"""Every kind of denoiser that a bundle may name, with the files in its folder.

A super-resolution denoiser is the second stage of a cascade, whose first encodes the prompt.
"""
BUNDLE_FILES: Mapping[str, tuple[str, ...]] = {"super-resolution": (PROMPT_STATES,)}
"""Files that a bundle itself holds for its kind of denoiser."""

TUNABLE_KINDS = ("open-clip", "timm", "transformers")
"""Kinds of classifiers that give gradients, as an adaptation needs."""


class NoGradients(ValueError):
    """The networks give no gradients by which an image could be attacked."""


DENOISER_GROUP, CLASSIFIER_GROUP = "vouchsafe.denoisers", "vouchsafe.classifiers"
"""Entry points by which installed packages add kinds; their values are loaders."""
_ONNXRUNTIME = ("onnxruntime-gpu", "onnxruntime")


def installed(group: str) -> dict[str, metadata.EntryPoint]:
    """The kinds that installed packages add to a group; their code is not imported."""
    return {point.name: point for point in metadata.entry_points(group=group)}


def denoiser_kinds() -> tuple[str, ...]:
    """Every kind of denoiser on this machine; a package cannot replace one of the project's."""
    return tuple(dict.fromkeys([*DENOISER_FILES, *installed(DENOISER_GROUP)]))


def classifier_kinds() -> tuple[str, ...]:
    """Every kind of classifier on this machine."""
    return tuple(dict.fromkeys([*CLASSIFIER_FILES, *installed(CLASSIFIER_GROUP)]))


def is_own(kind: str) -> bool:
    """Whether the kind is one of the project's, not of an installed package."""
    return kind in DENOISER_FILES or kind in CLASSIFIER_FILES


def gives_gradients(classifier: str) -> bool:
    """Whether classifiers of the kind may give gradients; those of a package are not checked."""
    return classifier in TUNABLE_KINDS or not is_own(classifier)


def libraries(denoiser: str, classifier: str) -> tuple[str, ...]:
    """What computes these kinds of networks beside torch: packages with their versions.

    A release of such a package may change outputs, so it is a part of the numerics.
    """
    used = [_package(DENOISER_GROUP, denoiser), _package(CLASSIFIER_GROUP, classifier)]
    used.append(_onnxruntime() if classifier == "onnx" else "")
    return tuple(dict.fromkeys(name for name in used if name))


def _package(group: str, kind: str) -> str:
    if is_own(kind) or (point := installed(group).get(kind)) is None or point.dist is None:
        return ""
    return f"{point.dist.name} {point.dist.version}"


def _onnxruntime() -> str:
    for name in _ONNXRUNTIME:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return ""
