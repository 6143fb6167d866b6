from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from models.bundle import Base, Bundle, BundleError
from models.memory import (
    TooLittleMemory,
)
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.operations import metrics
from service.worker.backoff import FIRST_SECONDS
from service.worker.compute import DeviceFailed
from service.worker.model import DigestChanged, ModelUnavailable
from service.worker.model_cache import TaskModel
from tests.support.fakes import FakeModel, make_job
from tests.support.serving import TASKS
from tests.support.shelf import NUMERICS, ROWS, Shelf, ask, bundles, digest_in
from tests.support.working import assert_exact, working


def test_everything_but_the_votes_is_known_without_loading() -> None:
    """Digest, batch, classes and padding stand before the networks do, and stay as they were."""
    shelf = Shelf(bundles("default", "pets"))
    model = shelf.cache["pets"]
    assert model.digest == bundles("pets")["pets"].served_digest(NUMERICS.described())
    assert (model.batch_rows, model.classes) == (4, 4)
    assert [model.padding(rows) for rows in (1, 4, 5)] == [3, 0, 3]
    assert shelf.loads == []
    assert ask(model).sum() == 3
    ask(model)
    assert shelf.loads == ["pets"]
    assert shelf.cache["pets"] is model


def test_a_tasks_own_libraries_are_announced_before_it_loads() -> None:
    """A task on ONNX has onnxruntime's version in its numerics and digest; others have not."""
    tasks = bundles("default", "own")
    tasks["own"] = replace(tasks["own"], classifier=Base("onnx"))
    shelf = Shelf(tasks)
    own = shelf.cache["own"]
    assert own.numerics.runtime == f"torch, onnxruntime {version('onnxruntime')}"
    assert own.digest == tasks["own"].served_digest(own.numerics.described())
    assert shelf.cache["default"].numerics == NUMERICS
    assert shelf.loads == []


def test_the_tasks_used_last_stay_loaded() -> None:
    """Besides the default only the most recently used networks are kept; others load again."""
    shelf = Shelf(bundles("default", "a", "b", "c"))
    shelf.use("default", "a", "b", "a", "c")
    assert shelf.loaded == {"default", "a", "c"}
    shelf.use("b", "default")
    assert shelf.loaded == {"default", "b", "c"}
    assert shelf.loads == ["default", "a", "b", "c", "b"]


def test_tasks_come_and_go() -> None:
    """A task that is gone takes its networks with it, and one that changed is another model."""
    tasks = bundles("default", "a", "b")
    shelf = Shelf(tasks)
    shelf.use("a", "b")
    gone, old = shelf.cache["a"], shelf.cache["b"]
    del tasks["a"]
    tasks["b"] = replace(tasks["b"], k=2.0)
    assert list(shelf.cache) == ["default", "b"]
    assert not gone.is_loaded
    assert shelf.cache["b"].digest != old.digest
    assert shelf.loaded == set()


def test_what_cannot_be_loaded_is_withheld_for_a_while() -> None:
    """Twice as long after every failure, and after a success as at first; others are served."""
    shelf = Shelf(bundles("default", "a"))
    model, error = shelf.cache["a"], BundleError(f"{TASKS['default'].folder.parent}/a: 'x' is gone")
    shelf.use("default")
    shelf.failures, waits = [error] * 6, []
    while shelf.failures:
        with pytest.raises(ModelUnavailable, match="Task \"a\" cannot be loaded: a: 'x' is gone"):
            shelf.use("a")
        began = shelf.clock()
        while not model.is_available:
            shelf.clock.advance(1)
        waits.append(shelf.clock() - began)
        shelf.use("default")
    assert waits == [30, 60, 120, 240, 300, 300]
    shelf.use("a")
    assert model.is_available
    assert shelf.loaded == {"default", "a"}
    model.unload()
    shelf.failures = [error]
    with pytest.raises(ModelUnavailable):
        shelf.use("a")
    shelf.clock.advance(FIRST_SECONDS)
    assert model.is_available


def test_another_model_than_was_promised_is_refused() -> None:
    """Networks under another digest than the task's jobs were keyed with never answer."""
    shelf = Shelf(bundles("default", "a"))
    model = shelf.cache["a"]
    model.digest = "promised otherwise"
    with pytest.raises(ModelUnavailable, match="not as promised otherwi"):
        ask(model)
    assert not model.is_loaded


def test_a_task_that_goes_while_it_loads_leaves_no_networks() -> None:
    """Networks that come when their task is gone, or is another bundle, do not stay in memory."""
    tasks = bundles("default", "a", "b")
    shelf = Shelf(tasks)
    shelf.use("default")
    gone, old = shelf.cache["a"], shelf.cache["b"]

    def slow(bundle: Bundle, batch_rows: int) -> FakeModel:
        tasks.pop("a", None)
        tasks["b"] = replace(TASKS["default"], id="b", k=2.0)
        dict(shelf.cache)
        return shelf.load(bundle, batch_rows)

    shelf.load_with(slow)
    for model in (gone, old):
        assert ask(model).sum() == 3
        assert not model.is_loaded


def test_networks_of_a_bundle_that_changed_are_unloaded() -> None:
    """The networks of what was there before go as soon as another bundle is seen."""
    tasks = bundles("default", "a")
    shelf = Shelf(tasks)
    shelf.use("a")
    old = shelf.cache["a"]
    tasks["a"] = replace(tasks["a"], k=2.0)
    assert shelf.cache["a"] is not old
    assert not old.is_loaded


def test_tasks_may_come_while_room_is_made() -> None:
    """The event loop may add a task while the compute thread looks through those there are."""
    tasks = bundles("default", "a", "b")
    shelf = Shelf(tasks)
    shelf.use("a")

    class Arriving(TaskModel):
        @property
        def pinned(self) -> bool:
            tasks[f"new-{len(tasks)}"] = TASKS["default"]
            shelf.cache[f"new-{len(tasks) - 1}"]
            return True

        @pinned.setter
        def pinned(self, pinned: bool) -> None:
            pass

    shelf.cache._models["arriving"] = Arriving(TASKS["default"], shelf.cache, pinned=True)
    shelf.use("b")
    shelf.cache.unload_others(shelf.cache["b"])
    assert shelf.loaded == {"b"}


def test_a_device_of_two_minds_is_withheld_by_no_task() -> None:
    """A device that fails its check while a task is loaded is broken for every task."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = [DeviceFailed("got different labels in another batch")]
    with pytest.raises(DeviceFailed):
        shelf.use("a")


def test_too_little_room_is_made_once() -> None:
    """Where weights do not fit the other tasks' networks go, the default's stay, and it is retried
    at the same shape: nothing has been computed yet."""
    error = TooLittleMemory("stage II")
    shelf = Shelf(bundles("default", "a", "b"), max_loaded=4)
    shelf.use("default", "a")
    shelf.failures = [error]
    shelf.use("b")
    assert shelf.loaded == {"default", "b"}
    assert shelf.cache["b"].digest == digest_in(4, "b")
    shelf.failures = [error, error, error]
    with pytest.raises(ModelUnavailable, match="too little memory"):
        shelf.use("a")
    assert len(shelf.failures) == 1
    assert shelf.loaded == {"default"}


ONCE = {
    "said": (torch.OutOfMemoryError("CUDA out of memory."), 1),
    "on the host": (MemoryError(), 0),
}
SWALLOWED = {
    "in other words": (RuntimeError("GET was unable to find an engine to execute this"), 1),
    "unsaid": (None, 1),
    "said after all": (torch.OutOfMemoryError("CUDA out of memory."), 2),
}


@pytest.mark.parametrize("how", ONCE)
def test_a_batch_for_which_memory_ran_out_is_tried_once_more(
    how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After caches were freed, at the same shape and under the same digest, with the same votes."""
    shelf, freed = Shelf(bundles("default", "a")), []
    right = ask(shelf.cache["a"])
    monkeypatch.setattr("service.worker.batch_shape.let_go", lambda: freed.append(shelf.tries))
    shelf.batch_failures, shelf.tries = [ONCE[how]], 0
    assert np.array_equal(ask(shelf.cache["a"]), right)
    assert (freed, shelf.tries, shelf.loads) == ([1], 2, ["a"])
    assert shelf.cache["a"].digest == digest_in(4)
    assert "memory ran out for a batch" in caplog.text


@pytest.mark.parametrize("task", ["default", "a"])
def test_a_batch_for_which_memory_ran_out_twice_ends_the_process(task: str) -> None:
    """Of whichever task: the process is started again, and chooses a shape that fits."""
    shelf = Shelf(bundles("default", "a"))
    shelf.batch_failures = [ONCE["said"]] * 2
    with pytest.raises(DeviceFailed, match=f"memory ran out twice for a batch of task '{task}'"):
        shelf.use(task)


@pytest.mark.parametrize("how", SWALLOWED)
def test_a_library_that_takes_another_way_ends_the_process(how: str) -> None:
    """Its kernel is not the digest's, and is remembered: a second try would be counted."""
    shelf = Shelf(bundles("default", "a"))
    shelf.batch_failures = [SWALLOWED[how]]
    with pytest.raises(DeviceFailed, match="a library took another kernel"):
        shelf.use("a")
    assert shelf.tries == 1


def test_an_error_beside_memory_is_no_want_of_it() -> None:
    """What a library says of itself is taken for short memory only where memory was short."""
    shelf = Shelf(bundles("default", "a"))
    shelf.batch_failures = [(RuntimeError("GET was unable to find an engine"), 0)]
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        shelf.use("a")
    assert shelf.tries == 1


async def test_another_worker_finishes_what_one_cannot_go_on_with() -> None:
    """Of two workers of one digest, one runs out of memory twice: it ends, and the other answers
    every job."""
    shelf, digest = Shelf(bundles("default")), digest_in(4, "default")
    engine = MemoryEngine(EngineOptions(shard_rows=10, lease_seconds=60), poll_seconds=0.01)
    healthy = FakeModel(batch_rows=4, classes=4, digest=digest)
    healthy.gate.clear()
    jobs = [make_job(f"job-{number}", bundle=digest, classes=4) for number in range(20)]
    await engine.pull(Worker("someone", {"default": digest}), 1)
    for job in jobs:
        await engine.submit(job)
    shelf.use("default")
    shelf.batch_failures = [ONCE["said"]] * 2
    async with (
        working(engine, {"default": healthy}, worker_id="healthy"),
        working(engine, shelf.cache, worker_id="ill") as ill,
    ):
        with pytest.raises(DeviceFailed, match="memory ran out twice"):
            await ill.ends()
        healthy.gate.set()
        for job in jobs:
            await assert_exact(engine, job)


def test_rows_of_another_digest_are_not_computed() -> None:
    """Whichever way the networks are loaded."""
    shelf = Shelf(bundles("default", "a"))
    with pytest.raises(DigestChanged):
        shelf.cache["a"].votes([ROWS], digest_in(2))
    assert shelf.tries == 0


@pytest.mark.parametrize(("counts", "shapes"), [(1, [4, 2]), (0, [4, 4, 2])])
def test_the_largest_batch_that_fits_is_chosen_as_networks_load(
    counts: int, shapes: list[int]
) -> None:
    """Other tasks make room, then batches are halved, before anything is answered. A shape at which
    the device ran out is tried once; rows asked for under the digest of before are not counted."""
    shelf, told = Shelf(bundles("default", "a", "b")), metrics.SHAPES_LOWERED._value.get()
    shelf.use("b")
    shelf.shapes, shelf.room, shelf.counts = [], 3, counts
    model = shelf.cache["a"]
    with pytest.raises(DigestChanged, match="'a' is served under another digest"):
        ask(model)
    assert shelf.shapes == shapes
    assert (model.digest, model.batch_rows, model.padding(3)) == (digest_in(2), 2, 1)
    assert (model.is_available, shelf.loaded) == (True, {"a"})
    assert metrics.SHAPES_LOWERED._value.get() == told + 1
    assert ask(model, replace(ROWS, stop=2)).sum() == 2
    assert set(shelf.alive) == {0}
    shelf.cache["default"].loaded()
    assert shelf.cache["default"].digest == digest_in(2, "default")


def test_a_shape_at_which_the_device_ran_out_is_tried_for_no_task() -> None:
    """Not even where there would be room: kernels that were chosen then are remembered."""
    tasks = bundles("default", "a", "b")
    shelf = Shelf(tasks)
    shelf.room = 3
    with pytest.raises(DigestChanged):
        shelf.use("a")
    shelf.room, shelf.shapes = 99, []
    with pytest.raises(DigestChanged):
        shelf.use("b")
    tasks["a"] = replace(tasks["a"])
    assert shelf.cache["a"].digest == digest_in(4)
    with pytest.raises(DigestChanged):
        shelf.use("a")
    assert shelf.shapes == [2, 2]


def test_memory_that_runs_out_unsaid_in_loading_halves_too() -> None:
    """Networks that were warmed while a library went another way, or that then had two minds, are
    not those of the digest."""
    shelf = Shelf(bundles("default", "a"))
    errors = [DeviceFailed("got different labels in another batch"), None]

    def short(bundle: Bundle, rows: int) -> FakeModel:
        made = shelf.load(bundle, rows)
        if rows == 4:
            shelf.short += 1
            if error := errors.pop():
                raise error
        return made

    shelf.load_with(short)
    for task in ("a", "default"):
        shelf.cache.shapes._fitting.clear()
        with pytest.raises(DigestChanged):
            shelf.use(task)
        assert shelf.cache[task].digest == digest_in(2, task)
    assert shelf.alive == [0, 0, 0, 0]


def test_what_does_not_fit_at_the_smallest_batch_is_withheld() -> None:
    """It alone, and it is tried at its shape again."""
    shelf = Shelf(bundles("default", "a"))
    shelf.use("default")
    shelf.room, shelf.counts = 1, 0
    with pytest.raises(ModelUnavailable, match="too little memory for its networks"):
        shelf.use("a")
    model = shelf.cache["a"]
    assert shelf.shapes == [4, 4, 4, 2]
    assert (model.is_available, model.digest, shelf.loaded) == (False, digest_in(4), {"default"})
    shelf.room = 99
    shelf.use("a")


def test_weights_that_do_not_fit_leave_the_shape() -> None:
    """A smaller shape is no help where the weights alone are too much: the digest stays."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = [TooLittleMemory("stage II")] * 2
    with pytest.raises(ModelUnavailable, match="too little memory: stage II"):
        shelf.use("a")
    assert shelf.failures == []
    assert shelf.cache["a"].digest == digest_in(4)
    shelf.use("a")
