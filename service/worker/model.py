"""What a worker computes with: the networks of one served task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.rows import Numerics, Rows


class ModelUnavailable(RuntimeError):
    """A task's networks cannot be had, whatever the rows; it says nothing of the device."""


class ShapeLowered(RuntimeError):
    """The device ran out of memory: the task has another digest by now, its batches fewer rows, and
    nothing was counted of what was asked."""


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
    def is_refused(self) -> bool:
        """Whether it could not be loaded when last tried, while other workers may have it: it is
        not served here until a try has loaded it."""

    @property
    def is_due(self) -> bool:
        """Whether it is refused, and to be tried again."""

    def try_again(self) -> None:
        """Load the networks of a refused task, at little cost to the others; blocks.

        Raises ModelUnavailable where they cannot be loaded, and DeviceFailed as `votes`.
        """

    def votes(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch under this served digest; blocks.

        Raises ModelUnavailable where the networks cannot be loaded, ShapeLowered where the digest
        is another, and DeviceFailed where no answer can be had in this process any more.
        """


def warm_up(resolution: int, rows: int) -> list[Rows]:
    """So many rows of each of the three images that networks compute as they are loaded."""
    shape = (3, resolution, resolution)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    return [Rows(image, bytes(32), 0, rows, 0.25) for image in images]
