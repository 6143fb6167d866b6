"""Networks of DeepFloyd IF-II-L's and CLIP ViT-B/32's shape with random weights, and ways to run
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from open_clip.model import set_model_preprocess_cfg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.classifiers.open_clip import OpenClipClassifier
from models.denoisers.prompts import PROMPT_TOKENS
from models.denoisers.super_resolution import SuperResolutionDenoiser
from models.nano.architectures import if_scheduler
from models.rows import Rows
from models.runtime import Network, Runtime, RuntimeUnavailable, Torch, numerics_of
from models.smoothing import SmoothedModel

SIGMA, K = 0.25, 1.8
KEY = b"benchmark/noise/" * 2
LABELS = tuple(f"thing number {index}" for index in range(100))
TEMPLATE = "This is a photo of a {}."
CHECKED = 64
"""Pictures whose labels are compared between variants, a row of noise each."""

IF_II_L: dict[str, Any] = {
    # IF-II-L's own config.json is behind a licence and was not at hand. Guessed, and together
    # 1.203 billion parameters where its card says 1.2: widths, layers, which level attends, and
    # the width that prompts are projected to.
    "block_out_channels": (192, 384, 768, 1536),
    "layers_per_block": (2, 3, 4, 5),
    "down_block_types": (*["ResnetDownsampleBlock2D"] * 3, "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", *["ResnetUpsampleBlock2D"] * 3),
    "cross_attention_dim": 1536,
    "attention_head_dim": 64,
    # From diffusers' scripts/convert_if.py (superres_create_unet_diffusers_config and
    # get_super_res_unet), which made the published stage II, and from deepfloyd_if/model/unet.py.
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "time_embedding_dim": 1536,  # the first width times the last multiplier
    "only_cross_attention": True,  # the converter's default for stage II
    "cross_attention_norm": "group_norm",
    "act_fn": "gelu",
    "time_embedding_act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
    "class_embed_type": "timestep",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "encoder_hid_dim": 4096,  # the width of T5-XXL
    "encoder_hid_dim_type": "text_proj",
    # From method.md 1.3 and 1.4.
    "in_channels": 6,
    "out_channels": 6,
}
SMALLER: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": (1, 1, 1, 2),
    "cross_attention_dim": 32,
    "attention_head_dim": 32,
    "time_embedding_dim": 64,
    "addition_embed_type_num_heads": 4,
    "encoder_hid_dim": 32,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What to build: diffusers' and open_clip's configurations, and the pictures' side."""

    unet: dict[str, Any]
    clip: dict[str, Any]
    resolution: int


def full_size() -> Shape:
    """IF-II-L before ViT-B/32 with quick GELU, at the paper's resolution."""
    clip = open_clip.get_model_config("ViT-B-32-quickgelu")
    return Shape(IF_II_L, clip, 224)


def miniature() -> Shape:
    """Every kind of block of `full_size`, and under two million parameters."""
    clip = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 4},
        "text_cfg": {"vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    return Shape({**IF_II_L, **SMALLER}, clip, 16)


class Compiled:
    """torch.compile for one fixed shape, in one of its modes."""

    def __init__(self, mode: str) -> None:
        self.name = f"torch.compile {mode}"
        self._mode = mode

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """`dtype` itself."""
        return dtype

    def prepare(self, network: nn.Module) -> Network:
        """Compiled at the first call, which raises where there is no compiler."""
        compiled: Network = torch.compile(network, mode=self._mode, dynamic=False)
        return compiled


class Graphed:
    """Eager torch, recorded once as a CUDA graph and replayed."""

    name = "torch, CUDA graph"

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """`dtype` itself; raises RuntimeUnavailable off a CUDA device."""
        if device.type != "cuda":
            raise RuntimeUnavailable(f"CUDA graphs need a CUDA device; not {device.type}")
        return dtype

    def prepare(self, network: nn.Module) -> Network:
        """Recorded at the first call."""
        return _Graph(network)


class _Graph:
    """Inputs are copied to where the recording reads them, and its output from where it writes."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not self._inputs:
            self._record(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._output.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        held = tuple(tensor.clone() for tensor in inputs)
        beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(2):  # Libraries allocate and choose at first, which must not be recorded
                self._network(*held)
        current.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._network(*held)
        self._inputs = held


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the networks. `tuned`: cuDNN picks each convolution by trying all it has.

    `start_seconds` is a guess at how long the first call takes on a GPU.
    """

    name: str
    runtime: Callable[[], Runtime] = Torch
    dtype: torch.dtype = torch.bfloat16
    memory_format: torch.memory_format = torch.channels_last
    tuned: bool = False
    start_seconds: float = 0.0


VARIANTS = (
    Variant("fp32", dtype=torch.float32, memory_format=torch.contiguous_format),
    Variant("bf16", memory_format=torch.contiguous_format),
    Variant("bf16 channels-last"),
    Variant("bf16 channels-last, tuned", tuned=True),
    Variant("CUDA graph", Graphed),
    Variant("CUDA graph, tuned", Graphed, tuned=True),
    Variant("compile", lambda: Compiled("default"), start_seconds=60),
    Variant("compile, tuned", lambda: Compiled("default"), tuned=True, start_seconds=60),
    Variant("max-autotune, tuned", lambda: Compiled("max-autotune"), tuned=True, start_seconds=200),
)
"""In an order in which no variant needs weights that an earlier one has rounded."""


class Networks:
    """One UNet and one CLIP on a device, in float32 at first and changed in place by `smoothed`."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        clip = {name: value for name, value in shape.clip.items() if name != "custom_text"}
        with torch.device(device):
            self.unet: Any = UNet2DConditionModel(**shape.unet)
            self.clip: Any = open_clip.CLIP(**clip).eval()
            self.states = torch.randn(PROMPT_TOKENS, shape.unet["encoder_hid_dim"])
        described = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        set_model_preprocess_cfg(self.clip, {"size": shape.resolution, **described})
        self._tokenizer = open_clip.SimpleTokenizer()
        self.device = device
        self.resolution = shape.resolution

    def parameters(self) -> dict[str, int]:
        """How many numbers a row passes."""
        parts = {"denoiser": self.unet, "classifier": self.clip.visual}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def adapters(
        self, runtime: Runtime, dtype: torch.dtype
    ) -> tuple[SuperResolutionDenoiser, OpenClipClassifier]:
        """This project's own denoiser and classifier around the two networks."""
        alphas_cumprod = if_scheduler(sample_max_value=1.0).alphas_cumprod
        denoiser = SuperResolutionDenoiser(self.unet, alphas_cumprod, self.states, K, runtime)
        return denoiser, OpenClipClassifier(
            self.clip, self._tokenizer, LABELS, TEMPLATE, dtype, runtime
        )

    def smoothed(self, variant: Variant, rows: int) -> SmoothedModel:
        """The model that the service would run, in batches of `rows` rows.

        Raises RuntimeUnavailable where the device cannot run the variant.
        """
        runtime = variant.runtime()
        dtype = runtime.weights_dtype(self.device, variant.dtype)
        torch.backends.cudnn.benchmark = variant.tuned
        nn.Module.to(self.unet, dtype)  # diffusers' own warns of what this UNet does not have
        nn.Module.to(self.unet, memory_format=variant.memory_format)
        denoiser, classifier = self.adapters(runtime, dtype)
        numerics = numerics_of(self.device, dtype, rows, runtime.name)
        return SmoothedModel(denoiser, classifier, numerics, self.device)

    def centre(self) -> None:
        """Subtract from CLIP's output its mean over the pictures, which dominates with random
        weights.

        So labels tell pictures apart, and a wrong variant from a right one.
        """
        pixels = np.stack([rows.pixels for rows in pictures(self.resolution)])
        x = torch.tensor(pixels, device=self.device) / 255
        with torch.no_grad():
            mean = F.normalize(self.clip.encode_image((x - 0.45) / 0.27).mean(0), dim=0)
            self.clip.visual.proj -= self.clip.visual.proj @ torch.outer(mean, mean)


def pictures(resolution: int) -> list[Rows]:
    """A row of noise around each of `CHECKED` pictures, 4 x 4 squares of random colors."""
    drawn = np.random.default_rng(0).integers(0, 256, (CHECKED, 3, 4, 4), np.uint8)
    side = -(-resolution // 4)
    large = drawn.repeat(side, 2).repeat(side, 3)[:, :, :resolution, :resolution]
    return [
        Rows(np.ascontiguousarray(pixels), KEY, row, row + 1, SIGMA)
        for row, pixels in enumerate(large)
    ]


def operations(shape: Shape) -> int:
    """Floating-point operations of one row; a multiplication and an addition are two.

    Counted on the meta device, for convolutions, matrix products and attention only.
    """
    meta = torch.device("meta")
    denoiser, classifier = Networks(shape, meta).adapters(Torch(), torch.float32)
    x_hat = torch.empty(1, 3, shape.resolution, shape.resolution, device=meta)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier(denoiser(x_hat, torch.tensor([SIGMA], dtype=torch.float64)))
    counted: int = counter.get_total_flops()
    return counted
