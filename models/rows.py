"""Noise rows to be labeled and the numerics their labels depend on: plain data, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCHES_A_THREAD = 4
"""Batches of a device batch for each CPU thread.

Noise is drawn for all of them at once, and a slow thread delays the others less.
"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Noise rows [start, stop) under `key` (32 bytes) around one image.

    `pixels` (3,H,W) uint8; `sigma` in [0,1] pixel units. Rows that are `purified` are purifications
    instead: diffused as far as sigma, and reversed step by step (docs/purification.md).
    """

    pixels: NDArray[np.uint8]
    key: bytes
    start: int
    stop: int
    sigma: float
    purified: bool = False


@dataclass(frozen=True, slots=True)
class Numerics:
    """Everything except the weights that a network's output depends on (design.md, Numerics)."""

    device: str
    dtype: str
    batch_rows: int
    threads: int
    runtime: str
    torch_version: str

    def described(self) -> dict[str, Any]:
        """As plain JSON values, for `Bundle.served_digest`."""
        return asdict(self)

    def padding(self, rows: int) -> int:
        """Rows that the networks compute only to fill their batches when `rows` are requested."""
        return -rows % self.batch_rows

    def device_rows(self, cpu_threads: int) -> int:
        """Largest number of rows of a device batch for `cpu_threads` threads (0: one batch)."""
        return self.batch_rows * max(1, BATCHES_A_THREAD * cpu_threads)
