"""Chooses the shape of a task's batches by what fits in memory, and counts votes within it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.memory import TooLittleMemory, is_counted, let_go, ran_out, times_short
from models.rows import Rows
from service.operations.logs import naming
from service.worker.compute import DeviceFailed

if TYPE_CHECKING:
    from models.smoothing import SmoothedModel

logger = logging.getLogger("vouchsafe")

SMALLEST_BATCH = 2
"""Fewest rows of the networks' batches that are tried."""


class BatchShapes:
    """Loads networks for the largest batches that fit, at most `most_rows` rows.

    `load(bundle, rows)` loads and warms networks for batches of `rows`. `times_short` counts the
    device's failed allocations. A batch size at which an allocation failed is not tried again for
    the same base networks: libraries cache the kernels that they chose for it then.
    """

    def __init__(
        self,
        load: Callable[[Bundle, int], SmoothedModel],
        most_rows: int,
        times_short: Callable[[], int] = times_short,
    ) -> None:
        self.load = load
        self.most_rows = most_rows
        self._fitting: dict[str, int] = {}  # by the folder of a base network
        self._times_short = times_short

    def load_largest(
        self, bundle: Bundle, rows: int, make_room: Callable[[], None]
    ) -> tuple[SmoothedModel, int]:
        """Networks for batches of at most `rows`, and their batch's rows.

        Where the networks do not fit, calls `make_room` and tries again, then halves the batches.

        Raises what `load` raises. Its memory error is raised where halving cannot help: the weights
        do not fit, or SMALLEST_BATCH rows do not.
        """
        rows, room_was_made = min(rows, self.most_rows_of(bundle)), False
        while True:
            before = self._times_short()
            try:
                return self._load_once(bundle, rows), rows
            except Exception as error:
                ran_short = self._times_short() > before
                if not ran_short and not ran_out(error):
                    raise
                halves = ran_short or (room_was_made and not isinstance(error, TooLittleMemory))
                if (room_was_made and not halves) or (halves and rows <= SMALLEST_BATCH):
                    raise
                _warn(bundle, f"not loaded for batches of {rows} rows", error)
            rows = max(SMALLEST_BATCH, rows // 2) if halves else rows
            if ran_short:
                self._fitting.update(dict.fromkeys(_bases(bundle), rows))
            make_room()
            room_was_made = True

    def most_rows_of(self, bundle: Bundle) -> int:
        """Rows of the largest batch that is tried for the bundle's base networks."""
        return min(self._fitting.get(base, self.most_rows) for base in _bases(bundle))

    def _load_once(self, bundle: Bundle, rows: int) -> SmoothedModel:
        before = self._times_short()
        model = self.load(bundle, rows)
        if self._times_short() > before:
            raise MemoryError("memory ran out while loading, and a library took another kernel")
        return model

    def votes(
        self, bundle: Bundle, model: SmoothedModel, parts: Sequence[Rows]
    ) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of a batch, tried once more where memory runs out.

        Raises DeviceFailed where memory runs out twice, and what `SmoothedModel.votes` raises.
        """
        votes = self._votes_once(bundle, model, parts)
        if votes is None:
            let_go()
            votes = self._votes_once(bundle, model, parts)
        if votes is None:
            raise DeviceFailed(
                f"memory ran out twice for a batch of task {bundle.id!r}; "
                "free device memory and restart"
            )
        return votes

    def _votes_once(
        self, bundle: Bundle, model: SmoothedModel, parts: Sequence[Rows]
    ) -> NDArray[np.int64] | None:
        """The votes; None where memory ran out. Drops the error, whose frames hold the batch.

        Raises DeviceFailed where more allocations failed than were raised: a library then took, and
        caches, another kernel than the digest covers.
        """
        before, raised, votes = self._times_short(), 0, None
        try:
            votes = model.votes(parts)
        except Exception as error:
            if not ran_out(error) and self._times_short() == before:
                raise
            _warn(bundle, "memory ran out for a batch", error)
            raised = int(is_counted(error))
        if self._times_short() - before > raised:
            raise DeviceFailed(
                f"memory ran out for a batch of task {bundle.id!r}, "
                "and a library took another kernel"
            )
        return votes


def _warn(bundle: Bundle, event: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    logger.warning("task %s: %s: %s", bundle.id, event, reason, extra=naming(task_id=bundle.id))


def _bases(bundle: Bundle) -> tuple[str, str]:
    return bundle.denoiser.folder, bundle.classifier.folder
