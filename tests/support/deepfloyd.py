"""Miniatures in the exact layout of DeepFloyd IF's and CLIP's repositories, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import sentencepiece
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from models.nano.architectures import DEEPFLOYD_UNET, STAGE1_UNET, STAGE2_UNET, TEXT_WIDTH
from models.nano.captions import SYNONYMS, TEMPLATES

NARROW: dict[str, Any] = {
    **DEEPFLOYD_UNET,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
SMALL, LARGE = 32, 128
PIECES = 100
CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 224,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 32,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def scheduler(sample_max_value: float) -> DDPMScheduler:
    """DeepFloyd's own, with the variance learned as it is there (method.md 1.3)."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        variance_type="learned_range",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
    )


def unet(stage: int) -> UNet2DConditionModel:
    torch.manual_seed(stage)
    own = STAGE1_UNET if stage == 1 else STAGE2_UNET
    return UNet2DConditionModel(
        **{**own, **NARROW, "sample_size": SMALL if stage == 1 else LARGE}
    ).eval()


def save_tokenizer(folder: Path) -> None:
    """A sentencepiece model, in the files of a T5 tokenizer that was never converted."""
    folder.mkdir(parents=True)
    words = [word for words in SYNONYMS.values() for word in words]
    sentences = [template.format(word).lower() for template in TEMPLATES for word in words]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, "0123456789 abcdefghijklmnopqrstuvwxyz ,'-"]),
        model_prefix=str(folder / "spiece"),
        vocab_size=PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    named["additional_special_tokens"] = [f"<extra_id_{index}>" for index in range(100)]
    config = {**named, "tokenizer_class": "T5Tokenizer", "extra_ids": 100, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))


def save_text_encoder(folder: Path) -> None:
    """Shards of half precision, but for the layers that T5 keeps in single."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=PIECES + 100,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config).half()
    for name, module in encoder.named_modules():
        if name.endswith(".wo"):
            module.float()
    encoder.save_pretrained(folder, variant="fp16", max_shard_size="60KB")


def save_index(folder: Path, name: str, **parts: Any) -> None:
    index = {
        "_class_name": name,
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "watermarker": ["deepfloyd_if", "IFWatermarker"],
        **parts,
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def save_stage1(folder: Path) -> None:
    save_tokenizer(folder / "tokenizer")
    save_text_encoder(folder / "text_encoder")
    unet(1).half().save_pretrained(folder / "unet", variant="fp16")
    scheduler(1.5).save_pretrained(folder / "scheduler")
    save_index(folder, "IFPipeline")


def save_stage2(folder: Path, variant: str | None = None) -> None:
    unet(2).half().save_pretrained(folder / "unet", variant=variant)
    for name in ("scheduler", "image_noising_scheduler"):
        scheduler(1.0).save_pretrained(folder / name)
    noising = {"image_noising_scheduler": ["diffusers", "DDPMScheduler"]}
    save_index(folder, "IFSuperResolutionPipeline", **noising)


def save_clip(folder: Path) -> None:
    torch.manual_seed(4)
    folder.mkdir(parents=True)
    model = open_clip.CLIP(**CLIP_CONFIG["model_cfg"])
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG))


def save_models(models_dir: Path, variant: str | None = None) -> Path:
    """A models directory with all of if-ii-l; stage II's UNet in this variant of its weights."""
    save_stage1(models_dir / "if-ii-l" / "stage1")
    save_stage2(models_dir / "if-ii-l" / "stage2", variant)
    save_clip(models_dir / "clip-vit-b-32")
    return models_dir
