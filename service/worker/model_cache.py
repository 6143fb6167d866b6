"""Cache of the networks of tasks: loads them at their first use, unloads the least recent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, BundleError
from models.memory import let_go
from models.rows import Numerics, Rows
from service.operations import metrics
from service.operations.logs import naming
from service.worker.backoff import Backoff, cannot_load
from service.worker.batch_shape import BatchShapes
from service.worker.compute import DeviceFailed
from service.worker.model import DigestChanged, ModelUnavailable, warm_up

if TYPE_CHECKING:
    from models.smoothing import SmoothedModel

logger = logging.getLogger("vouchsafe")

LOAD_SECONDS = 1_800.0
"""Seconds that a task's networks may load before the device counts as hung."""
DEMONSTRATION_SECONDS = 600.0
"""The same for a demonstration, which may load networks that give gradients."""

Demonstrate = Callable[
    [Bundle, "SmoothedModel", Rows, float | None], tuple[NDArray[np.int64], bytes]
]
"""Computes a demonstration on a bundle's networks; see `Model.demonstrate`."""


class ModelCache(Mapping[str, "TaskModel"]):
    """A model for every task in `tasks`, which may change at any time.

    - `shapes`: loads networks for batches of at most the rows in `numerics`, in `cpu_threads`.
    - `max_loaded`: number of tasks whose networks stay loaded, beside the default task's.
    - `patient`: `ComputeThread.patient`.
    - `compute_demonstration`: computes demonstrations.

    The event loop reads the cache; the compute thread loads and unloads networks.
    """

    def __init__(
        self,
        tasks: Mapping[str, Bundle],
        shapes: BatchShapes,
        numerics: Numerics,
        cpu_threads: int,
        max_loaded: int,
        patient: Callable[[float], AbstractContextManager[None]],
        compute_demonstration: Demonstrate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shapes = shapes
        self.numerics = numerics
        self.cpu_threads = cpu_threads
        self.patient = patient
        self.compute_demonstration = compute_demonstration
        self.clock = clock
        self._tasks = tasks
        self._max_loaded = max_loaded
        self._models: dict[str, TaskModel] = {}
        self._recent: list[TaskModel] = []

    def __getitem__(self, task: str) -> TaskModel:
        bundle = self._tasks[task]
        model = self._models.get(task)
        if model is None or model.bundle is not bundle:
            replaced = model
            model = self._models[task] = TaskModel(bundle, self, pinned=task == "default")
            if replaced is not None:
                replaced.unload()
        return model

    def __iter__(self) -> Iterator[str]:
        for task in self._models.keys() - self._tasks.keys():
            self._models.pop(task).unload()
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def holds(self, model: TaskModel) -> bool:
        """Whether the model is still the current one of its task."""
        return any(model is other for other in list(self._models.values()))

    def make_room_for(self, model: TaskModel) -> None:
        """Note the use of a model, and unload the tasks that were used least recently."""
        self._recent = [other for other in self._recent if other.is_loaded and other is not model]
        self._recent = [*self._recent, model][-self._max_loaded :]
        for other in list(self._models.values()):
            if not other.pinned and other not in self._recent:
                other.unload()

    def unload_others(self, model: TaskModel) -> None:
        """Unload all networks except this model's and the default task's."""
        for other in list(self._models.values()):
            if not other.pinned and other is not model:
                other.unload()
        let_go()


class TaskModel:
    """A task as the worker serves it; its digest is announced before its networks are loaded.

    A `pinned` model is never unloaded. Loading chooses the batch size, which may change the digest.
    """

    numerics: Numerics
    batch_rows: int
    digest: str

    def __init__(self, bundle: Bundle, cache: ModelCache, *, pinned: bool) -> None:
        self.bundle = bundle
        self.pinned = pinned
        self.classes = len(bundle.labels)
        self._cache = cache
        self._backoff = Backoff(cache.clock)
        self._loaded: SmoothedModel | None = None
        self._serve_under(bundle.numerics(cache.numerics))

    @property
    def is_available(self) -> bool:
        """Whether the worker announces the task; False during the backoff after a failed load."""
        return self._backoff.is_over

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory."""
        return self._loaded is not None

    @property
    def sample(self) -> Rows:
        """A row that the networks computed as they were loaded."""
        return warm_up(self.bundle.resolution, 1, 1)[0]

    def padding(self, rows: int) -> int:
        """Padding rows in a device batch of `rows`."""
        return self.numerics.padding(rows)

    def unload(self) -> None:
        """Drop the networks; the next use loads them again."""
        self._loaded = None

    def votes(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch under this served digest.

        Loads the networks where they are not loaded.

        Raises ModelUnavailable where they cannot be loaded, DigestChanged where they are loaded
        under another digest, and what `BatchShapes.votes` raises.
        """
        return self._cache.shapes.votes(self.bundle, self._loaded_under(digest), parts)

    def demonstrate(
        self, rows: Rows, epsilon: float | None, digest: str
    ) -> tuple[NDArray[np.int64], bytes]:
        """See `Model.demonstrate`; loads the networks where they are not loaded."""
        model = self._loaded_under(digest)
        with self._cache.patient(DEMONSTRATION_SECONDS):
            return self._cache.compute_demonstration(self.bundle, model, rows, epsilon)

    def _loaded_under(self, digest: str) -> SmoothedModel:
        model = self.loaded()
        if self.digest != digest:
            raise DigestChanged(
                f"task {self.bundle.id!r} is served under another digest: {self.digest[:16]}"
            )
        return model

    def loaded(self) -> SmoothedModel:
        """The networks, loaded where they are not; for the compute thread only.

        Raises ModelUnavailable where they cannot be loaded, which begins the backoff; DeviceFailed
        where the device gives the same rows different labels.
        """
        if not self.pinned:
            self._cache.make_room_for(self)
        if self._loaded is not None:
            return self._loaded
        try:
            with self._cache.patient(LOAD_SECONDS):
                model = self._load_largest()
            if model.digest != self.digest:
                raise BundleError(f"loads as {model.digest[:16]}, not as {self.digest[:16]}")
        except DeviceFailed:
            raise  # No vote of such a device may be committed.
        except Exception as error:
            if not isinstance(error, BundleError):  # Its message is the full reason.
                named = naming(task_id=self.bundle.id)
                logger.exception("task %s cannot be loaded", self.bundle.id, extra=named)
            self._backoff.fail()
            raise ModelUnavailable(cannot_load(self.bundle, error)) from error
        self._backoff.succeed()
        if self._cache.holds(self):  # The task may have been deleted during the load.
            self._loaded = model
        return model

    def _load_largest(self) -> SmoothedModel:
        """The networks for the largest batches that fit; may change the digest."""
        model, rows = self._cache.shapes.load_largest(
            self.bundle, self.numerics.batch_rows, partial(self._cache.unload_others, self)
        )
        if rows != self.numerics.batch_rows:
            self._serve_under(replace(self.numerics, batch_rows=rows))
            metrics.SHAPES_LOWERED.inc()
            logger.warning(
                "for want of memory task %s is served in batches of %d rows, under %s",
                self.bundle.id,
                rows,
                self.digest[:16],
                extra=naming(task_id=self.bundle.id),
            )
        return model

    def _serve_under(self, numerics: Numerics) -> None:
        self.numerics = numerics
        self.batch_rows = numerics.device_rows(self._cache.cpu_threads)
        self.digest = self.bundle.served_digest(numerics.described())
