"""A model cache whose networks are fakes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.bundle import Bundle
from models.smoothing import Numerics, Rows
from service.worker.batch_shape import BatchShapes
from service.worker.model_cache import ModelCache, TaskModel
from tests.support.fakes import FakeClock, FakeModel
from tests.support.serving import TASKS

NUMERICS = Numerics("a CPU", "float32", 4, 1, "torch", "2.9")


ROWS = Rows(np.zeros((3, 8, 8), np.uint8), b"k" * 32, 0, 3, 0.25)


def bundles(*names: str) -> dict[str, Bundle]:
    return {name: replace(TASKS["default"], id=name) for name in names}


def fake_demonstration(
    bundle: Bundle, model: Any, rows: Rows, epsilon: float | None
) -> tuple[NDArray[np.int64], bytes]:
    """What the fake networks compute of a demonstration."""
    found: tuple[NDArray[np.int64], bytes] = model.demonstrate(rows, epsilon, model.digest)
    return found


class Narrow(FakeModel):
    """A model whose next batches run out of memory as the shelf says."""

    def __init__(self, shelf: Shelf, **options: Any) -> None:
        super().__init__(**options)
        self.shelf = shelf

    def votes(self, parts: Iterable[Rows], digest: str = "") -> NDArray[np.int64]:
        self.shelf.tries += 1
        if self.shelf.batch_failures:
            error, counted = self.shelf.batch_failures.pop(0)
            self.shelf.short += counted
            if error is not None:
                raise error
        return super().votes(parts, self.digest)


class Shelf:
    """Networks of some tasks whose loading is written down, and fails as a test wants.

    `failures` are raised by loads, and `batch_failures` by batches: an error, or None where a
    library catches it, and how many allocations the device counts as failed. Loads for batches of
    more than `room` rows run out of memory, which the device `counts` or not.
    """

    def __init__(
        self,
        tasks: dict[str, Bundle],
        max_loaded: int = 2,
        patient: Callable[[float], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self.loads: list[str] = []
        self.shapes: list[int] = []
        self.failures: list[Exception] = []
        self.batch_failures: list[tuple[Exception | None, int]] = []
        self.alive: list[int] = []  # during each load: networks of that task still in memory
        self.room, self.counts, self.short, self.tries = 99, 1, 0, 0
        self._made: list[tuple[str, weakref.ref[Narrow]]] = []
        self.clock = FakeClock()
        shapes: BatchShapes = BatchShapes(
            self.load,  # type: ignore[arg-type]
            NUMERICS.batch_rows,
            times_short=lambda: self.short,
        )
        self.cache = ModelCache(
            tasks, shapes, NUMERICS, 0, max_loaded, patient, fake_demonstration, self.clock
        )

    def load(self, bundle: Bundle, batch_rows: int) -> FakeModel:
        self.loads.append(bundle.id)
        self.shapes.append(batch_rows)
        self.alive.append(sum(of == bundle.id and made() is not None for of, made in self._made))
        if self.failures:
            raise self.failures.pop()
        if batch_rows > self.room:
            self.short += self.counts
            raise torch.OutOfMemoryError("CUDA out of memory.") if self.counts else MemoryError()
        digest = bundle.served_digest(replace(NUMERICS, batch_rows=batch_rows).described())
        made = Narrow(self, batch_rows=batch_rows, classes=4, digest=digest)
        self._made.append((bundle.id, weakref.ref(made)))
        return made

    def load_with(self, load: Callable[[Bundle, int], Any]) -> None:
        """Load in another way from now on."""
        self.cache.shapes.load = load

    def use(self, *tasks: str) -> None:
        for task in tasks:
            ask(self.cache[task])

    @property
    def loaded(self) -> set[str]:
        return {task for task, model in self.cache.items() if model.is_loaded}


def ask(model: TaskModel, rows: Rows = ROWS) -> NDArray[np.int64]:
    """The votes of these rows under the digest that the task has."""
    return model.votes([rows], model.digest)


def digest_in(rows: int, task: str = "a") -> str:
    return bundles(task)[task].served_digest(replace(NUMERICS, batch_rows=rows).described())
