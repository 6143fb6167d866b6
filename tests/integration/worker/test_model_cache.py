from __future__ import annotations

import asyncio
import errno
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import DEFAULT_TASK, MODELS, Bundle, BundleError, read_bundle
from models.memory import (
    ADAPTATION_SHARE,
    TooLittleMemory,
    cap_adaptation,
    check_headroom,
    let_go_of,
    ran_out,
    times_short,
)
from models.runtime import Torch
from models.smoothing import Numerics, Rows
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Worker
from service.operations import metrics
from service.processes import runtime as serving
from service.processes.runtime import load_and_warm
from service.worker.backoff import FIRST_SECONDS
from service.worker.batch_shape import BatchShapes
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.model import DigestChanged, ModelUnavailable
from service.worker.model_cache import ModelCache, TaskModel
from tests.integration.worker.test_loop import assert_exact, working
from tests.support.fakes import FakeClock, FakeModel, make_job
from tests.support.serving import TASKS

NUMERICS = Numerics("a CPU", "float32", 4, 1, "torch", "2.9")
ROWS = Rows(np.zeros((3, 8, 8), np.uint8), b"k" * 32, 0, 3, 0.25)


def bundles(*names: str) -> dict[str, Bundle]:
    return {name: replace(TASKS["default"], id=name) for name in names}


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
        self.cache = ModelCache(tasks, shapes, NUMERICS, 0, max_loaded, patient, self.clock)

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
    shelf.failures = [DeviceFailed("the same rows got two answers")]
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


def digest_in(rows: int, task: str = "a") -> str:
    return bundles(task)[task].served_digest(replace(NUMERICS, batch_rows=rows).described())


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
    errors = [DeviceFailed("the same rows got two answers"), None]

    def short(bundle: Bundle, rows: int) -> FakeModel:
        made = shelf.load(bundle, rows)
        if rows == 4:
            shelf.short += 1
            if error := errors.pop():
                raise error
        return made

    shelf.load_with(short)
    for task in ("a", "default"):
        shelf.cache.shapes.most_rows = 4
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


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("taken", "free", "beside", "fits"),
    [
        (80, 15, False, True),
        (80, 5, False, False),  # Another process has the rest.
        (95, 20, False, False),
        (35, 60, True, True),
        (45, 50, True, False),  # An adaptation may take half.
    ],
)
def test_the_largest_batch_leaves_headroom_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, taken: int, free: int, beside: bool, fits: bool
) -> None:
    """A tenth of its memory, and an adaptation's share where one may run; a CPU is not checked."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: taken)
    check_headroom(torch.device("cpu"), beside_adaptation=beside)
    with nullcontext() if fits else pytest.raises(MemoryError, match="are taken and"):
        check_headroom(GPU, beside_adaptation=beside)


def test_an_adaptation_keeps_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that shapes chosen before it began stay valid beside it."""
    capped: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *asked: capped.append(asked)
    )
    cap_adaptation(torch.device("cpu"))
    cap_adaptation(GPU)
    assert capped == [(ADAPTATION_SHARE, GPU)]


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("unable to mmap 12 bytes: Cannot allocate memory (12)"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
)
def test_errors_of_memory_are_known(error: Exception, out: bool) -> None:
    """Host's, device's and libraries' ways to say that memory ran out, and nothing else."""
    assert ran_out(error) is out


def test_errors_that_came_of_each_other_are_let_go_of() -> None:
    """A library may raise what it caught from what that led to."""

    class Activations:
        pass

    def fail(error: Exception) -> None:
        held = Activations()
        alive.append(weakref.ref(held))
        raise error

    alive: list[weakref.ref[Activations]] = []
    errors = ValueError("one"), KeyError("two")
    for error in errors:
        with pytest.raises(type(error)):
            fail(error)
    errors[0].__cause__, errors[1].__cause__ = errors[1], errors[0]
    freeing = threading.Thread(target=let_go_of, args=(errors[0],), daemon=True)
    freeing.start()
    freeing.join(5)
    assert not freeing.is_alive()
    assert [each() for each in alive] == [None, None]


def test_short_memory_is_counted_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of PyTorch's allocator, seen by anybody or not; none without a GPU."""
    if not torch.cuda.is_available():
        assert times_short() == 0
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda: {"num_ooms": 3})
    assert times_short() == 3


def test_an_error_tells_callers_only_its_kind() -> None:
    """What was not foreseen is named by its type; its words are for the log."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = [RuntimeError("/secret/path")]
    with pytest.raises(ModelUnavailable, match=r"RuntimeError$"):
        shelf.use("a")


async def test_loading_is_no_hung_device() -> None:
    """A load may pass the limit of a device batch; the batch after it may not."""
    thread = ComputeThread(batch_seconds_limit=0.1)
    shelf = Shelf(bundles("default", "a"), patient=thread.patient)
    gate = threading.Event()
    shelf.load_with(lambda *asked: (gate.wait(), shelf.load(*asked))[1])
    model = shelf.cache["a"]
    computing = asyncio.ensure_future(thread.run(ask, model))
    await asyncio.sleep(0.2)
    assert thread.busy
    assert thread.healthy
    gate.set()
    await computing
    held = threading.Event()
    hanging = asyncio.ensure_future(thread.run(held.wait))
    await asyncio.sleep(0.2)
    assert not thread.healthy
    held.set()
    await hanging
    thread.close()


def test_loading_computes_the_sample_that_tests_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The self-test asks networks for a row that they were seen to compute."""
    asked: list[Rows] = []

    class Seen(FakeModel):
        def labels(self, parts: list[Rows]) -> NDArray[np.int64]:
            asked.extend(parts)
            return np.zeros(self.batch_rows, np.int64)

    monkeypatch.setattr(serving, "load", lambda bundle, **_: Seen())
    bundle = read_bundle(DEFAULT_TASK)
    load_and_warm(bundle, 16, runtime=Torch(), cpu_threads=0)
    sample = Shelf({"default": bundle}).cache["default"].sample
    assert (sample.start, sample.stop) == (0, 1)
    assert any(
        np.array_equal(each.pixels, sample.pixels)
        and replace(each, pixels=ROWS.pixels, stop=1) == replace(sample, pixels=ROWS.pixels)
        for each in asked
    )


def test_networks_that_have_changed_since_are_not_loaded(tmp_path: Path) -> None:
    """What a bundle builds on is hashed anew as it loads; callers are told which file it is."""
    default, base = read_bundle(DEFAULT_TASK), tmp_path / "nets" / "stage2"
    shutil.copytree(MODELS / default.denoiser.folder, base)
    shutil.copytree(DEFAULT_TASK, tmp_path / "tasks" / "pets")
    made = replace(default, id="pets", denoiser=replace(default.denoiser, folder=str(base)))
    (tmp_path / "tasks" / "pets" / "manifest.json").write_text(json.dumps(made.manifest))
    bundle = read_bundle(tmp_path / "tasks" / "pets")
    (base / "unet" / "config.json").write_text("{}")
    load = partial(load_and_warm, runtime=Torch(), cpu_threads=1, models_dir=tmp_path)
    cache = ModelCache(
        {"pets": bundle}, BatchShapes(load, 4), NUMERICS, 1, 1, lambda _: nullcontext()
    )
    with pytest.raises(ModelUnavailable, match=r"'unet/config.json' does not have the hash"):
        ask(cache["pets"])
