"""Description and measured ceilings of a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import open_clip
import torch

from models.runtime import cpu_kind

REPEATS = 3


def machine(device: torch.device) -> dict[str, Any]:
    """The properties of the machine that figures depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_kind(),
        "memory, GiB": torch.cuda.mem_get_info()[1] >> 30 if cuda else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "diffusers": diffusers.__version__,
        "open_clip": open_clip.__version__,
        "TF32 in fp32's convolutions": torch.backends.cudnn.allow_tf32,
        "precision of fp32's matrix products": torch.get_float32_matmul_precision(),
    }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Duration of a call, from an idle device until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_teraflops(side: int, device: torch.device) -> float:
    """TFLOP/s of a product of two square matrices of random bfloat16."""
    a, b = torch.randn(2, side, side, device=device).bfloat16()
    return 2 * side**3 / _a_call(lambda: torch.mm(a, b), device) / 1e12


def copy_gigabytes(mebibytes: int, device: torch.device) -> float:
    """GB/s, read and written together, of a copy within the device's memory."""
    source = torch.ones(mebibytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / _a_call(lambda: target.copy_(source), device) / 1e9


def ceilings(sides: Sequence[int], mebibytes: int, device: torch.device) -> dict[str, Any]:
    """Both of the above, the product at several sizes."""
    products = {str(side): round(matmul_teraflops(side, device), 6) for side in sides}
    copying = round(copy_gigabytes(mebibytes, device), 1)
    return {"bf16 matmul, TFLOP/s": products, "copy, GB/s read and written": copying}


def _a_call(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: of ten in a row, after ten more, the median of `REPEATS` times."""

    def ten() -> None:
        for _ in range(10):
            function()

    ten()
    return float(np.median([seconds(ten, device) for _ in range(REPEATS)])) / 10
