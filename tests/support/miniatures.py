"""Randomly initialized networks in the real folder layouts, a few kilobytes each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from diffusers import (
    DDPMScheduler,
    IFPipeline,
    IFSuperResolutionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import ByT5Tokenizer, T5EncoderModel

from models.nano.architectures import (
    DEEPFLOYD_UNET,
    HEAD_CONFIG,
    STAGE1_UNET,
    STAGE2_UNET,
    TEXT_ENCODER,
    TEXT_WIDTH,
    if_scheduler,
)
from tests.support import own_networks

LABELS = ("cat", "dog", "ship")
SMALLER: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def unet() -> UNet2DConditionModel:
    """A stage-II UNet with every ingredient of DeepFloyd's, but narrow; float32."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**STAGE2_UNET, **DEEPFLOYD_UNET, **SMALLER}).eval()


def states() -> torch.Tensor:
    """Arbitrary prompt states (77,D)."""
    return torch.randn(77, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))


def text_encoder() -> tuple[ByT5Tokenizer, T5EncoderModel]:
    """A byte-level tokenizer and a T5 encoder with random weights."""
    torch.manual_seed(2)
    return ByT5Tokenizer(extra_ids=125), T5EncoderModel(TEXT_ENCODER).eval()


def save_super_resolution(folder: Path) -> Path:
    """A stage-II folder in diffusers' layout."""
    unet().save_pretrained(folder / "unet")
    if_scheduler(sample_max_value=1.0).save_pretrained(folder / "scheduler")
    return folder


def save_open_clip(folder: Path) -> Path:
    """A CLIP in open_clip's folder layout."""
    torch.manual_seed(3)
    folder.mkdir(parents=True, exist_ok=True)
    described = json.loads(json.dumps(HEAD_CONFIG))
    described["model_cfg"]["vision_cfg"] = {
        "image_size": 64,
        "timm_model_name": "test_resnet",
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    model = open_clip.CLIP(
        **{name: described["model_cfg"][name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    ByT5Tokenizer(extra_ids=125).save_pretrained(folder)
    return folder


def save_timm(folder: Path) -> Path:
    """A timm network in timm's folder layout, its labels in the configuration."""
    torch.manual_seed(4)
    folder.mkdir(parents=True, exist_ok=True)
    model = timm.create_model("test_resnet", num_classes=len(LABELS))
    described = {
        "architecture": "test_resnet",
        "num_classes": len(LABELS),
        "model_args": {"num_classes": len(LABELS), "global_pool": "avg"},
        "label_names": list(LABELS),
        "pretrained_cfg": {
            "input_size": [3, 48, 48],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def save_nothing(folder: Path) -> Path:
    """The folder of a kind that needs no weights."""
    return folder


DENOISER_FOLDERS: dict[str, Callable[[Path], Path]] = {
    "super-resolution": save_super_resolution,
    "unconditional": own_networks.save_unconditional,
    "ffdnet": own_networks.save_ffdnet,
    "none": save_nothing,
}
CLASSIFIER_FOLDERS: dict[str, Callable[[Path], Path]] = {
    "onnx": own_networks.save_onnx,
    "open-clip": save_open_clip,
    "timm": save_timm,
    "transformers": own_networks.save_vit,
}


def reference_scheduler() -> DDPMScheduler:
    """Diffusers' own scheduler with IF-II's settings, for the one-step comparison."""
    return if_scheduler(sample_max_value=1.0)


def save_cascade(folder: Path) -> tuple[Path, Path]:
    """Stage I (8x8) and stage II (32x32), as diffusers' own pipelines save them."""
    absent: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    tokenizer, encoder = text_encoder()
    torch.manual_seed(5)
    shapes = {**STAGE1_UNET, **DEEPFLOYD_UNET, **SMALLER, "sample_size": 8}
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        unet=UNet2DConditionModel(**shapes),
        scheduler=if_scheduler(sample_max_value=1.5),
        **absent,
    ).save_pretrained(folder / "stage1")
    IFSuperResolutionPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=unet(),
        scheduler=if_scheduler(sample_max_value=1.0),
        image_noising_scheduler=if_scheduler(sample_max_value=1.0),
        **absent,
    ).save_pretrained(folder / "stage2")
    return folder / "stage1", folder / "stage2"
