"""Interface of a served task's networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.rows import Numerics, Rows


class ModelUnavailable(RuntimeError):
    """A task's networks cannot be loaded; neither the rows nor the device need be at fault."""


class DigestChanged(RuntimeError):
    """The networks were loaded for smaller batches than the digest covers; nothing was counted.

    The task has another digest from then on.
    """


class Model(Protocol):
    """A served task: networks that see one fixed shape, so that other rows change no label."""

    @property
    def batch_rows(self) -> int:
        """Maximum rows of a device batch."""

    @property
    def sample(self) -> Rows:
        """A row that the networks computed as they were loaded."""

    def padding(self, rows: int) -> int:
        """Padding rows in a device batch of `rows`."""

    @property
    def classes(self) -> int:
        """Number of labels, K."""

    @property
    def numerics(self) -> Numerics:
        """The numerics of the networks."""

    @property
    def digest(self) -> str:
        """The served digest: the bundle's, together with the numerics."""

    @property
    def is_available(self) -> bool:
        """Whether the worker announces the task; False during the backoff after a failed load."""

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory."""

    def votes(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch under this served digest; blocks.

        Raises ModelUnavailable where the networks cannot be loaded, DigestChanged where the model
        has another digest, and DeviceFailed where the process must exit.
        """

    def demonstrate(
        self, rows: Rows, epsilon: float | None, digest: str
    ) -> tuple[NDArray[np.int64], bytes]:
        """Votes by class (K,) of a demonstration's rows, and its pictures as JSON; blocks.

        With `epsilon` it is an attack, otherwise the rows are shown. Raises NoGradients for an
        attack on networks that give none, and ModelUnavailable and DigestChanged as `votes`.
        """


def warm_up(resolution: int, first: int, others: int) -> list[Rows]:
    """Rows of the three images that networks compute as they are loaded.

    They are `first` rows of the first image, and `others` of each of the other two.
    """
    shape = (3, resolution, resolution)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    return [
        Rows(image, bytes(32), 0, rows, 0.25)
        for image, rows in zip(images, (first, others, others), strict=True)
    ]
