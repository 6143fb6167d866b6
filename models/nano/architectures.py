"""Shapes of nano's networks: DeepFloyd IF's own layout, small."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler
from transformers import T5Config

TEXT_WIDTH = 64
SMALL, LARGE = 16, 32
K = 1.8
"""Timestep correction factor in stage II's training as a denoiser (method.md 1.4)."""

TEXT_ENCODER = T5Config(
    vocab_size=384,
    d_model=TEXT_WIDTH,
    d_kv=16,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    is_encoder_decoder=False,
    use_cache=False,
)

HEAD_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "airbench94",
            "timm_pool": "max",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 384,
            "hf_tokenizer_name": "byt5",
            "width": 64,
            "heads": 4,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": 1,
        },
    },
    "preprocess_cfg": {
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}

STAGE1_UNET: dict[str, Any] = {
    "sample_size": SMALL,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (64, 128, 160),
    "down_block_types": (
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
    ),
    "up_block_types": (
        "SimpleCrossAttnUpBlock2D",
        "SimpleCrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
    ),
}
STAGE2_UNET: dict[str, Any] = {
    "sample_size": LARGE,
    "in_channels": 6,
    "out_channels": 6,
    "block_out_channels": (32, 64, 128),
    "down_block_types": (
        "ResnetDownsampleBlock2D",
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
    ),
    "up_block_types": (
        "SimpleCrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
        "ResnetUpsampleBlock2D",
    ),
    "class_embed_type": "timestep",
}
DEEPFLOYD_UNET: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "norm_num_groups": 16,
    "cross_attention_dim": TEXT_WIDTH,
    "encoder_hid_dim": TEXT_WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "mid_block_scale_factor": 2**0.5,
}
"""What both stages share with DeepFloyd IF's own UNet configuration, but for the widths."""


def if_scheduler(sample_max_value: float) -> Any:
    """DeepFloyd IF's schedule (method.md 1.3), except for the untrained variance half."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        variance_type="fixed_small",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=sample_max_value,
    )
