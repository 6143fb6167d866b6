"""Networks loaded at their first use; those of the tasks used last stay loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle, BundleError
from models.memory import TooLittleMemory, let_go, ran_out, times_short
from models.rows import Numerics, Rows
from service.operations import metrics
from service.operations.logs import naming
from service.worker.backoff import Refusal
from service.worker.compute import DeviceFailed
from service.worker.model import ModelUnavailable, ShapeLowered, warm_up

if TYPE_CHECKING:
    from models.smoothing import SmoothedModel

T = TypeVar("T")

logger = logging.getLogger("vouchsafe")

LOAD_SECONDS = 1_800.0
"""How long a task's networks may take to load before the device counts as hung."""
ROOM_SECONDS = 3_600.0
"""How long, once room was made for a task, none is made for it that nobody asks for."""
SMALLEST_BATCH = 2
"""Fewest rows of the networks' batches to which a device that runs out of memory is lowered."""


@dataclass(frozen=True, slots=True)
class Loading:
    """How networks are had: `load` makes them for batches of so many rows, under `numerics` unless
    memory ran out, in so many `lanes`; `most` of them stay loaded besides the default task's, and
    `patient` and `afresh` are the compute thread's own. `times_short` counts the allocations that
    failed. `in_fleet`: whether other workers may load what cannot be loaded here."""

    load: Callable[[Bundle, int], SmoothedModel]
    numerics: Numerics
    lanes: int
    most: int
    patient: Callable[[float], AbstractContextManager[None]]
    afresh: Callable[[], None] = lambda: None
    times_short: Callable[[], int] = times_short
    in_fleet: bool = False
    clock: Callable[[], float] = time.monotonic


class Networks(Mapping[str, "TaskModel"]):
    """A model for every task in `tasks`, which may change at any time.

    Read by the event loop; networks are loaded and let go in the compute thread.
    """

    def __init__(self, tasks: Mapping[str, Bundle], loading: Loading) -> None:
        self.loading = loading
        self._tasks = tasks
        self._models: dict[str, TaskModel] = {}
        self._recent: list[TaskModel] = []

    def __getitem__(self, task: str) -> TaskModel:
        bundle = self._tasks[task]
        known = self._models.get(task)
        if known is None or known.bundle is not bundle:
            replaced = known
            known = self._models[task] = TaskModel(bundle, self, kept=task == "default")
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
        """Whether the model still is its task's."""
        return any(model is other for other in list(self._models.values()))

    def used(self, model: TaskModel) -> None:
        """Note that a model was used, before it loads where it is not loaded, and make room."""
        self._recent = [other for other in self._recent if other.is_loaded and other is not model]
        self._recent = [*self._recent, model][-self.loading.most :]
        for other in list(self._models.values()):
            if not other.kept and other not in self._recent:
                other.unload()

    def tried(self, model: TaskModel) -> None:
        """Note that a model was loaded though nobody asked for it: it stays where `most` are not
        loaded already, and is the next to be let go."""
        recent = [other for other in self._recent if other.is_loaded and other is not model]
        self._recent = [model, *recent][-self.loading.most :]
        if model not in self._recent:
            model.unload()

    def unload_others(self, model: TaskModel) -> None:
        """Let go of every task's networks but this one's and the default's."""
        for other in list(self._models.values()):
            if not other.kept and other is not model:
                other.unload()


class TaskModel:
    """A task as the worker serves it: all that admits its jobs is known before its networks are.

    A model that is `kept` is never let go. Where memory runs out in a batch, or as its networks are
    loaded, the task's batches are halved, as long as there is this model, and under another digest.
    """

    numerics: Numerics
    batch_rows: int
    digest: str

    def __init__(self, bundle: Bundle, networks: Networks, *, kept: bool) -> None:
        loading = networks.loading
        self.bundle = bundle
        self.kept = kept
        self.lanes = loading.lanes
        self.classes = len(bundle.labels)
        self.is_lowering = False
        self._networks = networks
        self._serve_under(loading.numerics)
        self._loaded: SmoothedModel | None = None
        self._refusal: Refusal | None = None
        self._made_room = float("-inf")

    @property
    def is_loaded(self) -> bool:
        """Whether the networks are in memory."""
        return self._loaded is not None

    @property
    def is_refused(self) -> bool:
        """Whether the networks could not be loaded when last tried, and others may have them."""
        return self._refusal is not None and self._networks.loading.in_fleet

    @property
    def is_due(self) -> bool:
        """Whether it is refused, and to be tried again."""
        refusal, clock = self._refusal, self._networks.loading.clock
        return refusal is not None and self.is_refused and clock() >= refusal.until

    @property
    def sample(self) -> Rows:
        """A row that the networks have computed before, as they were loaded."""
        return warm_up(self.bundle.resolution, 1)[0]

    def padding(self, rows: int) -> int:
        """Rows that the networks compute for nothing where so many are asked for."""
        return self.numerics.padding(rows)

    def votes(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch under this served digest, loading the
        networks if need be.

        Raises ModelUnavailable where they cannot be loaded, ShapeLowered where the digest is
        another, by now or all along, DeviceFailed where memory ran out for a model that is kept and
        no smaller batch can be had, and what `SmoothedModel.votes` raises.
        """
        votes = self._counted(parts, digest)
        if votes is None and self.digest == digest:
            self._lower()
        if votes is None:
            raise ShapeLowered(f"task {self.bundle.id!r} is served under another digest")
        return votes

    def _counted(self, parts: Sequence[Rows], digest: str) -> NDArray[np.int64] | None:
        """The votes; None under another digest, to which loading may have led, and where memory
        ran out. Holds on to the networks only until it returns."""
        model = self.loaded() if self.digest == digest else None
        if model is None or self.digest != digest:
            return None
        return self._spared(partial(model.votes, parts))

    def loaded(self) -> SmoothedModel:
        """The networks, loaded now where they were not; for the compute thread alone.

        Raises ModelUnavailable, at once for a while after it was tried in vain, and DeviceFailed.
        """
        refusal = self._refusal
        if refusal is not None and self._networks.loading.clock() < refusal.until:
            raise ModelUnavailable(refusal.detail)
        if not self.kept:
            self._networks.used(self)
        return self._loaded or self._load(self._loaded_with_room, self.numerics.batch_rows)

    def try_again(self) -> None:
        """Load the networks of a refused task though nobody asks for them; for the compute thread.

        They are tried in the room that there is, at the shape that they have. Where others fill the
        memory that would never succeed: once an hour room is made as if they had been asked for.
        Raises ModelUnavailable where they cannot be loaded, and DeviceFailed.
        """
        rested = self._networks.loading.clock() - self._made_room >= ROOM_SECONDS
        load = self._loaded_with_room if rested else self._loaded_in_place
        self._load(load, self.numerics.batch_rows)
        self._networks.tried(self)

    def unload(self) -> None:
        """Let the networks go; the next use loads them again."""
        self._loaded = None

    def _load(self, load: Callable[[int], tuple[SmoothedModel, int]], rows: int) -> SmoothedModel:
        """Load the networks in this way for batches of so many rows, or of fewer as it says."""
        loading = self._networks.loading
        began = loading.clock()
        try:
            with loading.patient(LOAD_SECONDS):
                model, rows = load(rows)
            if rows != self.numerics.batch_rows:
                self._serve_under(replace(self.numerics, batch_rows=rows))
            if model.digest != self.digest:
                raise BundleError(f"loads as {model.digest[:16]}, not as {self.digest[:16]}")
        except DeviceFailed:
            raise  # Nothing that such a device computes may be answered.
        except Exception as error:
            if not isinstance(error, BundleError):  # Its reason says it all.
                logger.exception("task %s cannot be loaded", self.bundle.id, extra=self._named)
            raise self._refuse(error, loading.clock() - began) from error
        if self._networks.holds(self):  # The task may have gone while its networks were loaded.
            self._loaded = model
        self._refusal = None
        return model

    def _loaded_with_room(self, rows: int) -> tuple[SmoothedModel, int]:
        """The networks and the rows of their batches: where the weights find too little room, once
        more without the other tasks' networks; where memory ran out, halved besides."""
        room_is_made = False
        while True:
            try:
                load = partial(self._networks.loading.load, self.bundle, rows)
                if model := self._spared(load):
                    return model, rows
                if rows <= SMALLEST_BATCH:
                    raise MemoryError(f"no memory for batches of {rows} rows")
                rows = _halved(rows)
            except TooLittleMemory as error:
                if room_is_made:
                    raise
                logger.warning("task %s: %s", self.bundle.id, error, extra=self._named)
            self._make_room()
            room_is_made = True

    def _loaded_in_place(self, rows: int) -> tuple[SmoothedModel, int]:
        """The networks for batches of so many rows, beside all that is loaded."""
        model = self._spared(partial(self._networks.loading.load, self.bundle, rows))
        if model is None:
            let_go()
            raise MemoryError(f"no memory for batches of {rows} rows")
        return model, rows

    def _spared(self, compute: Callable[[], T]) -> T | None:
        """What is computed; None where memory ran out meanwhile, whether or not an error says so:
        kernels that were chosen then are not those that the digest stands for, nor is this thread
        used again. Nothing is kept of an error, whose frames hold the batch."""
        loading = self._networks.loading
        before, result, said = loading.times_short(), None, "caught by a library"
        try:
            result = compute()
        except TooLittleMemory:
            raise  # Nothing was tried.
        except Exception as error:
            if not ran_out(error) and loading.times_short() == before:
                raise
            said = f"{type(error).__name__}: {error}"
        else:
            if loading.times_short() == before:
                return result
        loading.afresh()
        logger.warning("memory ran out for task %s: %s", self.bundle.id, said, extra=self._named)
        return None

    def _make_room(self) -> None:
        self._networks.unload_others(self)
        let_go()
        self._made_room = self._networks.loading.clock()

    def _refuse(self, error: Exception, took: float = 0.0) -> ModelUnavailable:
        """Refuse the task for an error of loading, which took so long; returns what to raise."""
        loading = self._networks.loading
        before = self._refusal if loading.in_fleet else None
        self._refusal = Refusal.of(self.bundle, error, loading.clock(), took, before)
        return ModelUnavailable(self._refusal.detail)

    def _lower(self) -> None:
        """Load the networks for batches of half the rows, or of fewer.

        Where they cannot be had nothing is left of what was computed with. Raises DeviceFailed for
        a model that is kept, for nothing is served without it, and ModelUnavailable for any other:
        it is tried at this shape once more after its refusal, as one that was never loaded.
        """
        rows = self.numerics.batch_rows
        self.is_lowering = True
        try:
            self.unload()
            self._make_room()
            if rows <= SMALLEST_BATCH:
                raise self._refuse(TooLittleMemory(f"a batch of {rows} rows does not fit"))
            self._load(self._loaded_with_room, _halved(rows))
        except ModelUnavailable as error:
            if not self.kept:
                raise
            raise DeviceFailed(f"memory ran out for a batch, and then: {error}") from error
        finally:
            self.is_lowering = False

    @property
    def _named(self) -> dict[str, str]:
        return naming(task_id=self.bundle.id)

    def _serve_under(self, numerics: Numerics) -> None:
        usual = self._networks.loading.numerics
        self.numerics = numerics
        self.batch_rows = numerics.device_rows(self.lanes)
        self.digest = self.bundle.served_digest(numerics.described())
        if numerics != usual:
            logger.warning(
                "memory ran out: task %s is served in batches of %d rows from now on, under %s",
                self.bundle.id,
                numerics.batch_rows,
                self.digest[:16],
                extra=self._named,
            )
            metrics.SHAPES_LOWERED.inc()


def _halved(rows: int) -> int:
    return max(SMALLEST_BATCH, rows // 2)
