"""What a worker computes with: the networks of one served task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.rows import Numerics, Rows


class ModelUnavailable(RuntimeError):
    """A task's networks cannot be loaded, whatever the rows; it says nothing of the device."""


class DigestChanged(RuntimeError):
    """The networks were loaded for batches of fewer rows than the digest says: the task has another
    digest now, and nothing was counted."""


class Model(Protocol):
    """A served task: networks that see one fixed shape, so that companions change nothing."""

    @property
    def batch_rows(self) -> int:
        """Most rows in a device batch."""

    @property
    def sample(self) -> Rows:
        """A row that the networks have computed before, as they were loaded."""

    def padding(self, rows: int) -> int:
        """Rows computed for nothing in a device batch of so many."""

    @property
    def classes(self) -> int:
        """K, the number of labels."""

    @property
    def numerics(self) -> Numerics:
        """The numerics that it computes under."""

    @property
    def digest(self) -> str:
        """The served digest: the bundle's, together with the numerics."""

    @property
    def is_available(self) -> bool:
        """Whether the task is announced; not for a while after it could not be loaded."""

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory."""

    def votes(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch under this served digest; blocks.

        Raises ModelUnavailable where the networks cannot be loaded, DigestChanged where the digest
        is another one, and DeviceFailed where this process can answer nothing more.
        """


def warm_up(resolution: int, rows: int) -> list[Rows]:
    """So many rows of each of the three images that networks compute as they are loaded."""
    shape = (3, resolution, resolution)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    return [Rows(image, bytes(32), 0, rows, 0.25) for image in images]
