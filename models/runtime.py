"""Runtimes of networks: torch, or OpenVINO with a conversion for their one batch shape."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.rows import Numerics

Network = Callable[..., Tensor]
"""Tensors of one fixed shape -> one tensor; gradients pass in eager torch only."""


class RuntimeUnavailable(OSError):
    """This machine cannot use a runtime; the message has the runtime and its requirement."""


class Runtime(Protocol):
    """A way to run networks. Outputs depend on torch and on `name`, which includes the version."""

    name: str

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype to load weights in for computation in `dtype`.

        Raises RuntimeUnavailable where this runtime cannot compute in it on the device.
        """

    def prepare(self, network: nn.Module) -> Network:
        """The network as a function of tensors, whose shapes must not change."""


def name_of_dtype(dtype: torch.dtype) -> str:
    """`bfloat16` for torch's bfloat16."""
    return str(dtype).removeprefix("torch.")


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def cpu_kind() -> str:
    """The CPU's properties that select kernels: its name, vector instructions and L2 cache."""
    known = torch.cpu.get_capabilities()
    units = [
        name for name in ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16") if known.get(name)
    ]
    level = torch.backends.cpu.get_cpu_capability()
    cache = known.get("l2_cache_size", 0) // 1024
    return " ".join([str(known.get("cpu_name", "cpu")), level, *units, f"L2 {cache} KiB"])


def numerics_of(
    device: torch.device,
    dtype: torch.dtype,
    batch_rows: int,
    runtime: str = "torch",
    threads: int | None = None,
) -> Numerics:
    """The numerics of this machine.

    They hold a GPU's name, or a CPU's `cpu_kind` and the threads that share a network's sums.
    `threads` defaults to torch's own number; it is 0 on a GPU.
    """
    if device.type == "cuda":
        kind, threads = torch.cuda.get_device_name(device), 0
    else:
        kind, threads = cpu_kind(), threads or torch.get_num_threads()
    version = ".".join(torch.__version__.split(".")[:2])
    return Numerics(kind, name_of_dtype(dtype), batch_rows, threads, runtime, version)


class Torch:
    """Eager torch, on every device and in every dtype."""

    name = "torch"

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """`dtype` itself."""
        return dtype

    def prepare(self, network: nn.Module) -> Network:
        """The network itself."""
        return network


class OpenVino:
    """OpenVINO on a CPU that computes in bfloat16: fused operators, constants folded.

    float32 is rejected: release 2026.4 crashes when it compiles nano's UNet in it.
    """

    def __init__(self) -> None:
        try:
            from openvino import get_version
        except ModuleNotFoundError as error:
            raise RuntimeUnavailable(
                "the runtime openvino is not installed: pip install openvino, or use torch"
            ) from error
        except ImportError as error:
            raise RuntimeUnavailable(f"the runtime openvino cannot be imported: {error}") from error
        self.name = "openvino " + ".".join(get_version().split(".")[:2])

    @staticmethod
    def check(device: torch.device, dtype: torch.dtype) -> None:
        """Raises RuntimeUnavailable where OpenVINO does not compute in `dtype` on the device."""
        if device.type != "cpu" or dtype != torch.bfloat16 or not computes_bfloat16():
            where = cpu_kind() if device.type == "cpu" else device.type
            raise RuntimeUnavailable(
                "the runtime openvino computes in bfloat16 on a CPU with AVX512-BF16, not in "
                f"{name_of_dtype(dtype)} on {where}; the runtime torch runs anywhere"
            )

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """float32; OpenVINO rounds the weights itself."""
        self.check(device, dtype)
        return torch.float32

    def prepare(self, network: nn.Module) -> Network:
        """A network converted at the first call of each thread and shape of inputs, with torch's
        threads.
        """
        return _Converted(network)


_CONVERTING = threading.Lock()
"""Held during a conversion: torch exports one network at a time in a process."""


class _Converted:
    """A network with one OpenVINO request for each calling thread and shape of inputs."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._converted: dict[tuple[torch.Size, ...], Any] = {}
        self._own = threading.local()

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        own: dict[tuple[torch.Size, ...], Any] = self._own.__dict__.setdefault("requests", {})
        if shapes not in own:
            with _CONVERTING:
                if shapes not in self._converted:
                    self._converted[shapes] = _converted(self._network, inputs)
            own[shapes] = _compiled(self._converted[shapes][0]).create_infer_request()
        arrays = [tensor.contiguous().numpy() for tensor in inputs]
        return torch.from_numpy(own[shapes].infer(arrays, share_inputs=True)[0])


def _converted(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """OpenVINO's model, and the tensors that its constants share memory with.

    Tracing takes a third of the time of `torch.export` and gives the same bits. The frontend is
    called directly, because `openvino.convert_model` sends usage statistics.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Constant shapes are intended, and export is slower.
        example = tuple(tensor.clone() for tensor in inputs)
        traced = torch.jit.trace(network, example, check_trace=False)
        decoder = TorchScriptPythonDecoder(traced, example_input=example)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    model.reshape({place: list(tensor.shape) for place, tensor in enumerate(example)})
    return model, traced


def _compiled(converted: Any) -> Any:
    from openvino import Core

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    return Core().compile_model(converted, "CPU", settings)


RUNTIMES: dict[str, Callable[[], Runtime]] = {"torch": Torch, "openvino": OpenVino}
"""The place to add a runtime: one adapter above and one line here."""
AUTO = "auto"
"""Selects one of RUNTIMES; see `automatic`."""


def automatic(device: torch.device, dtype: torch.dtype) -> tuple[Runtime, str]:
    """OpenVINO where it computes in `dtype` on the device, else torch; and the reason."""
    try:
        OpenVino.check(device, dtype)
        return OpenVino(), "this CPU computes in bfloat16"
    except RuntimeUnavailable as error:
        return Torch(), str(error)
