"""Checks for memory before a network is loaded, and recovery once memory has run out."""

from __future__ import annotations

import gc
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from models.zoo.inventory import hold
from models.zoo.sources import Network

if TYPE_CHECKING:
    import torch

ADAPTATION_SHARE = 0.5
"""Largest share of a GPU's memory for an adaptation.

The rest is left for the networks served beside it, whose batch shape was chosen before it began.
"""
HEADROOM = 0.1
"""Share of a GPU's memory that a task's largest batch leaves free.

It covers fragmentation and the memory that other processes take meanwhile.
"""

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_RAN_OUT = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "bad_alloc",
)


class TooLittleMemory(MemoryError):
    """Loading would not fit; the message has the network, the place, the bytes needed and free."""


def ran_out(error: BaseException) -> bool:
    """Whether an error reports that the memory of the host or of a device ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _RAN_OUT)


def times_short() -> int:
    """How often an allocation on the device has failed in this process; 0 without a GPU.

    Not each failure is raised: PyTorch's cuDNN convolutions catch it and take another kernel.
    """
    import torch

    return int(torch.cuda.memory_stats_as_nested_dict().get("num_ooms", 0))


def is_counted(error: BaseException) -> bool:
    """Whether `times_short` counts the allocation that raised this error."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def cap_adaptation(device: torch.device) -> None:
    """Limit this process to an adaptation's share of a GPU; a CPU has no such limit."""
    if device.type == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(ADAPTATION_SHARE, device)


def check_headroom(device: torch.device, *, beside_adaptation: bool) -> None:
    """Raises MemoryError where this process leaves too little of a GPU's memory free.

    `beside_adaptation`: whether an adaptation may take its share of the memory at any time. Nothing
    is checked on a CPU: there the failing allocation raises.
    """
    if device.type != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_reserved(device)
    max_share = 1 - HEADROOM - (ADAPTATION_SHARE if beside_adaptation else 0)
    if free < HEADROOM * total or taken > max_share * total:
        raise MemoryError(
            f"{taken / 2**30:.1f} of {total / 2**30:.1f} GiB are taken and {free / 2**30:.1f} free"
        )


def let_go() -> None:
    """Return unreferenced memory to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def let_go_of(error: BaseException) -> None:
    """Release what the frames of an error and of its causes refer to, such as a batch's tensors."""
    cause: BaseException | None = error
    seen: set[int] = set()  # Causes may form a cycle.
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def free_on_host() -> int | None:
    """Bytes that a process may still take on this machine or in its container; None if unknown."""
    limits = [room for room in (_available(), _left_in_cgroup()) if room is not None]
    return min(limits, default=None)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(available[0]) * 1024 if available else None


def _left_in_cgroup() -> int | None:
    """The container's limit less its usage; pages of files that can be evicted do not count."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        usage = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    going = sum(int(usage.get(name, 0)) for name in ("inactive_file", "active_file"))
    return None if limit == "max" else int(limit) - used + going


def bytes_of(folder: Path, weights: str, bytes_a_parameter: int) -> int:
    """Bytes of memory that the weights in a network's folder take once loaded."""
    return hold(folder, Network("", "config.json", weights)).size * bytes_a_parameter


def check_room(what: str, needed: int, device: torch.device) -> None:
    """Raises TooLittleMemory where `needed` bytes are not free on the host or on the device.

    All weights pass through the host's memory.
    """
    rooms = {"on this machine": free_on_host()}
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        rooms["on the device"] = torch.cuda.mem_get_info(device)[0] + cached
    for where, room in rooms.items():
        if room is not None and needed > room:
            raise TooLittleMemory(
                f"{what} takes {needed / 2**30:.1f} GiB and {room / 2**30:.1f} GiB are free {where}"
            )


def needs(text_encoder: int, stage1: int, stage2: int, classifier: int) -> dict[str, int]:
    """Bytes that the weights of networks with these numbers of parameters take, by purpose.

    Computed; activations come on top. An adapter is added in float32. An adaptation loads in turn:

    - the text encoder;
    - each UNet;
    - the classifier with its gradients and AdamW's two moments, beside stage II and the unadapted
      classifier;
    - stage II and the classifier before and after the adaptation.
    """
    return {
        "to serve in bfloat16": 2 * (stage2 + classifier),
        "to serve in float32": 4 * (stage2 + classifier),
        "to load an adapted task, on the host": 4 * stage2,
        "to adapt in bfloat16": max(
            2 * text_encoder,
            2 * stage1,
            2 * stage2 + (4 + 16) * classifier,
            2 * (2 * stage2 + 4 * classifier),
        ),
    }
