"""Kinds of networks: the files of each, and those that installed packages add; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

PROMPT_STATES = "prompt_states.safetensors"
"""A bundle's file that holds the prompt's states (77,D) as `states`."""
SAFETENSORS, ONNX = ".safetensors", ".onnx"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_TOKENIZER = ("*token*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
CLASSIFIER_FILES: Mapping[str, tuple[str, ...]] = {
    "onnx": ("model.onnx", "model.json"),
    "open-clip": ("open_clip_config.json", "open_clip_model*.safetensors", *_TOKENIZER),
    "timm": ("config.json", "model.safetensors"),
    "transformers": (
        "config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "*processor_config.json",
        *_TOKENIZER,
    ),
}
"""Every kind of classifier that a bundle may name, with patterns of the files in its folder."""

_TEXT_TO_IMAGE = (
    "stage1/text_encoder/*.json",
    "stage1/text_encoder/model*.safetensors",
    "stage1/tokenizer/*",
    "stage1/unet/*.json",
    "stage1/unet/diffusion_pytorch_model*.safetensors",
    "stage1/scheduler/*.json",
)
_UNET = ("unet/*.json", "unet/diffusion_pytorch_model*.safetensors", "scheduler/*.json")
DENOISER_FILES: Mapping[str, tuple[str, ...]] = {
    "super-resolution": (*_TEXT_TO_IMAGE, *(f"stage2/{pattern}" for pattern in _UNET)),
    "unconditional": _UNET,
    "ffdnet": ("model.safetensors",),
    "none": (),
}
"""Every kind of denoiser that a bundle may name, with patterns of the files in its folder."""
BUNDLE_FILES: Mapping[str, tuple[str, ...]] = {"super-resolution": (PROMPT_STATES,)}
"""Files that a bundle itself holds for its kind of denoiser."""

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
