"""Randomly initialized networks as their users have them: of transformers, ONNX, and denoisers."""

from __future__ import annotations

import json
import string
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.support import onnx_files

NAMES = ("cat", "dog", "ship")
SIDE = 48
_NARROW: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_VISION = {**_NARROW, "image_size": SIDE, "patch_size": 16}
_ENDS = ("<|startoftext|>", "<|endoftext|>")


def save_vit(folder: Path, labels: tuple[str, ...] = NAMES) -> Path:
    """A ViT and its image processor, as `save_pretrained` writes them."""
    torch.manual_seed(7)
    names = dict(enumerate(labels))
    config = ViTConfig(**_VISION, id2label=names, label2id={n: i for i, n in names.items()})
    model = ViTForImageClassification(config)
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[0.5, 0.4, 0.3]).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """A CLIP with its image processor and a tokenizer of single letters."""
    torch.manual_seed(8)
    pieces = [letter + end for letter in string.printable[:94] for end in ("", "</w>")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *_ENDS])}
    text = {
        **_NARROW,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 40,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=_VISION)).save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A SigLIP with its image processor and a sentencepiece tokenizer."""
    torch.manual_seed(9)
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"a photo of a {name}." for name in NAMES] * 4),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    SiglipTokenizer(vocab_file=str(folder / "spiece.model")).save_pretrained(folder)
    text = {**_NARROW, "vocab_size": 64, "max_position_embeddings": 64}
    SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION)).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    SiglipImageProcessor(size=size).save_pretrained(folder)
    return folder


def save_siglip_tower(folder: Path) -> Path:
    """A SigLIP's image tower with a head of fixed labels."""
    torch.manual_seed(12)
    config = SiglipConfig(vision_config=_VISION, id2label=dict(enumerate(NAMES)))
    model = SiglipForImageClassification(config)
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def save_onnx(folder: Path, batch: int | None = None) -> Path:
    """An ONNX file and the JSON beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx_files.save(folder / "model.onnx", onnx_files.network(len(NAMES)), SIDE, batch)
    described = {"size": SIDE, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "labels": NAMES}
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def save_onnx_parts(folder: Path) -> None:
    """Two ONNX files that cannot be used: `split` has its weights elsewhere, `listed` a list."""
    for name, beside in (("split", "net.onnx.data"), ("listed", "")):
        save_onnx(folder / name)
        network = onnx_files.network(len(NAMES))
        onnx_files.save(folder / name / "net.onnx", network, SIDE, beside=beside)
        (folder / name / "model.json").rename(folder / name / "net.json")
    (folder / "listed" / "net.json").write_text("[]")


def unconditional_unet(**changes: Any) -> UNet2DModel:
    """A narrow `UNet2DModel` of 32x32 pixels; half of its output channels are a variance."""
    torch.manual_seed(10)
    settings = {
        "sample_size": 32,
        "out_channels": 6,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    return UNet2DModel(**settings | changes).eval()


def save_unconditional(folder: Path, prediction: str = "epsilon") -> Path:
    """An unconditional diffusion model, as its pipeline writes it."""
    scheduler = DDPMScheduler(prediction_type=prediction)
    DDPMPipeline(unconditional_unet(), scheduler).save_pretrained(folder)
    return folder


def ffdnet_weights() -> dict[str, torch.Tensor]:
    """Random weights of a shallow color FFDNet in KAIR's layout."""
    torch.manual_seed(11)
    widths = (13, 16, 16, 12)
    convolutions = [nn.Conv2d(narrow, wide, 3) for narrow, wide in pairwise(widths)]
    return {
        f"model.{2 * index}.{name}": tensor.detach()
        for index, convolution in enumerate(convolutions)
        for name, tensor in convolution.named_parameters()
    }


def save_ffdnet(folder: Path) -> Path:
    """The folder of a shallow FFDNet."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(ffdnet_weights(), folder / "model.safetensors")
    return folder
