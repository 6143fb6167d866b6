"""Networks of tasks, loaded at their first use; those of the tasks used last stay loaded."""

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
"""How long a task's networks may take to load before the device counts as hung."""


class ModelCache(Mapping[str, "TaskModel"]):
    """A model for every task in `tasks`, which may change at any time.

    `shapes` loads networks, for batches of at most the rows in `numerics`, in `cpu_threads`.
    Networks of `max_loaded` tasks stay loaded beside the default one's. `patient` is the compute
    thread's own.

    Read by the event loop; networks are loaded and unloaded in the compute thread.
    """

    def __init__(
        self,
        tasks: Mapping[str, Bundle],
        shapes: BatchShapes,
        numerics: Numerics,
        cpu_threads: int,
        max_loaded: int,
        patient: Callable[[float], AbstractContextManager[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shapes = shapes
        self.numerics = numerics
        self.cpu_threads = cpu_threads
        self.patient = patient
        self.clock = clock
        self._tasks = tasks
        self._max_loaded = max_loaded
        self._models: dict[str, TaskModel] = {}
        self._recent: list[TaskModel] = []

    def __getitem__(self, task: str) -> TaskModel:
        bundle = self._tasks[task]
        known = self._models.get(task)
        if known is None or known.bundle is not bundle:
            replaced = known
            known = self._models[task] = TaskModel(bundle, self, pinned=task == "default")
            if replaced is not None:
                replaced.unload()
        return known

    def __iter__(self) -> Iterator[str]:
        for task in self._models.keys() - self._tasks.keys():
            self._models.pop(task).unload()
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def holds(self, model: TaskModel) -> bool:
        """Whether the model is still the one of its task."""
        return any(model is other for other in list(self._models.values()))

    def make_room_for(self, model: TaskModel) -> None:
        """Note that a model is used, and unload the task that was not used for longest."""
        self._recent = [other for other in self._recent if other.is_loaded and other is not model]
        self._recent = [*self._recent, model][-self._max_loaded :]
        for other in list(self._models.values()):
            if not other.pinned and other not in self._recent:
                other.unload()

    def unload_others(self, model: TaskModel) -> None:
        """Unload every task's networks but this one's and the default's."""
        for other in list(self._models.values()):
            if not other.pinned and other is not model:
                other.unload()
        let_go()


class TaskModel:
    """A task as the worker serves it: all that admits its jobs is there before its networks are.

    A model that is `pinned` is never unloaded. The shape of its batches is chosen as the networks
    are loaded, which may change its digest.
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
        self._serve_under(cache.numerics)

    @property
    def is_available(self) -> bool:
        """Whether the task is announced; not for a while after it could not be loaded."""
        return self._backoff.is_over

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory."""
        return self._loaded is not None

    @property
    def sample(self) -> Rows:
        """A row that the networks computed as they were loaded."""
        return warm_up(self.bundle.resolution, 1)[0]

    def padding(self, rows: int) -> int:
        """Rows that the networks compute for nothing in a batch of so many."""
        return self.numerics.padding(rows)

    def unload(self) -> None:
        """Drop the networks; the next use loads them again."""
        self._loaded = None

    def votes(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch under this served digest.

        Loads the networks if need be. Raises ModelUnavailable where they cannot be loaded,
        DigestChanged where they are loaded under another digest, and what `BatchShapes.votes`
        raises.
        """
        model = self.loaded()
        if self.digest != digest:
            raise DigestChanged(f"task {self.bundle.id!r} is served under another digest")
        return self._cache.shapes.votes(self.bundle, model, parts)

    def loaded(self) -> SmoothedModel:
        """The networks, loaded now where they were not; for the compute thread alone.

        Raises ModelUnavailable, after which the task is not announced for a while, and DeviceFailed
        where the device computes the same rows differently.
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
            raise  # Nothing that such a device computes may be answered.
        except Exception as error:
            if not isinstance(error, BundleError):  # Its reason says it all.
                named = naming(task_id=self.bundle.id)
                logger.exception("task %s cannot be loaded", self.bundle.id, extra=named)
            self._backoff.fail()
            raise ModelUnavailable(cannot_load(self.bundle, error)) from error
        self._backoff.succeed()
        if self._cache.holds(self):  # The task may have gone while its networks were loaded.
            self._loaded = model
        return model

    def _load_largest(self) -> SmoothedModel:
        """The networks for the largest batches that fit, which may change the digest."""
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
