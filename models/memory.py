"""Room for a network, looked for before it is loaded, and what to do once there is none."""

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
"""Most of a GPU's memory that an adaptation may take: the rest is left for networks that are served
beside it, whose batch shape was chosen before it began."""
HEADROOM = 0.1
"""Share of a GPU's memory that a task's largest batch leaves free, for what fragments and for what
other processes take meanwhile."""

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
    """Loading would not fit; the message names what, where, how much it takes and what is free."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _RAN_OUT)


def times_short() -> int:
    """How often an allocation on the device has failed since the process began; 0 without a GPU.

    Not each of them is raised: PyTorch's cuDNN convolutions catch it and take another kernel.
    """
    import torch

    return int(torch.cuda.memory_stats_as_nested_dict().get("num_ooms", 0))


def is_counted(error: BaseException) -> bool:
    """Whether `times_short` counts the allocation that raised this error."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def cap_adaptation(device: torch.device) -> None:
    """Keep this process within an adaptation's share of a GPU; a CPU has no such limit."""
    if device.type == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(ADAPTATION_SHARE, device)


def check_headroom(device: torch.device, *, beside_adaptation: bool) -> None:
    """Raises MemoryError where what this process took leaves too little of a GPU's memory free.

    `beside_adaptation`: whether an adaptation's share of the memory may be taken at any time. On a
    CPU nothing is checked: the allocation that fails says so.
    """
    if device.type != "cuda":
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_reserved(device)
    most = 1 - HEADROOM - (ADAPTATION_SHARE if beside_adaptation else 0)
    if free < HEADROOM * total or taken > most * total:
        raise MemoryError(
            f"{taken / 2**30:.1f} of {total / 2**30:.1f} GiB are taken and {free / 2**30:.1f} free"
        )


def let_go() -> None:
    """Give the memory of what nothing refers to any more back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def let_go_of(error: BaseException) -> None:
    """Forget what the frames of an error hold, and of those that it came of: a batch's tensors."""
    cause: BaseException | None = error
    seen: set[int] = set()  # An error may have come of one that came of it.
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def free_on_host() -> int | None:
    """Bytes that a process may still take on this machine or in its container; None: unknown."""
    limits = [room for room in (_available(), _left_in_cgroup()) if room is not None]
    return min(limits, default=None)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    told = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(told[0]) * 1024 if told else None


def _left_in_cgroup() -> int | None:
    """The container's limit less what it holds; pages of files that can go at once do not count."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    going = sum(int(kept.get(name, 0)) for name in ("inactive_file", "active_file"))
    return None if limit == "max" else int(limit) - used + going


def bytes_of(folder: Path, weights: str, bytes_a_parameter: int) -> int:
    """What the weights in a network's folder take once they are loaded."""
    return hold(folder, Network("", "config.json", weights)).size * bytes_a_parameter


def check_room(what: str, needed: int, device: torch.device) -> None:
    """Raises TooLittleMemory where so many bytes are not free, on the host, through which all
    weights go, or on the device."""
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
    """Bytes that the weights of networks of so many parameters take at once, by purpose.

    Computed; activations come on top. An adaptation holds in turn the text encoder, each UNet, the
    classifier with its gradients and AdamW's two moments beside stage II and the classifier at
    rest, and stage II and the classifier before and after. An adapter is added in float32.
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
