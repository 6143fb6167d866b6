from __future__ import annotations

import asyncio
import errno
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import DEFAULT_TASK, MODELS, Bundle, BundleError, read_bundle
from models.memory import TooLittleMemory, let_go_of, ran_out, times_short
from models.rows import Numerics, Rows
from models.runtime import Torch
from models.smoothing import SmoothedModel
from service.engine.memory import MemoryEngine
from service.engine.protocol import Worker
from service.operations import metrics
from service.processes import runtime as serving
from service.processes.runtime import load_and_warm
from service.worker.backoff import REFUSAL_SECONDS
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.model import ModelUnavailable, ShapeLowered
from service.worker.model_cache import Loading, Networks, TaskModel
from tests.integration.worker.test_loop import assert_exact, final, working
from tests.support.fakes import FakeClock, FakeModel, make_job
from tests.support.serving import TASKS

NUMERICS = Numerics("a CPU", "float32", 4, 1, "torch", "2.9")
ROWS = Rows(np.zeros((3, 8, 8), np.uint8), b"k" * 32, 0, 3, 0.25)


def bundles(*names: str) -> dict[str, Bundle]:
    return {name: replace(TASKS["default"], id=name) for name in names}


class Narrow(FakeModel):
    """A model whose batches must fit the shelf's room; where they do not, it says so or, like a
    library that goes on in another way, only counts it."""

    def __init__(self, shelf: Shelf, **options: Any) -> None:
        super().__init__(**options)
        self.shelf = shelf

    def votes(self, parts: Iterable[Rows], digest: str = "") -> NDArray[np.int64]:
        if self.batch_rows > self.shelf.room:
            self.shelf.short += self.shelf.counts
            if (error := self.shelf.error) is not None:
                raise type(error)(*error.args)  # Its own, for it holds on to its frames.
        return super().votes(parts, self.digest)


class Shelf:
    """Networks of some tasks whose loading is written down, and fails as a test wants.

    Batches of more than `room` rows run out of memory: with the `error`, and the device `counts` it
    or not.
    """

    def __init__(self, tasks: dict[str, Bundle], most: int = 2, **options: Any) -> None:
        self.loads: list[str] = []
        self.shapes: list[int] = []
        self.failures: list[Exception] = []
        self.announced: list[tuple[str, bool]] = []  # during each load: the digest, and lowering
        self.alive: list[int] = []  # during each load: networks of that task still in memory
        self.room, self.counts, self.short, self.fresh = 99, True, 0, 0
        self.error: Exception | None = torch.OutOfMemoryError("CUDA out of memory.")
        self._made: list[tuple[str, weakref.ref[Narrow]]] = []
        self.clock = FakeClock()
        loading: Loading = Loading(
            self.load,  # type: ignore[arg-type]
            NUMERICS,
            lanes=0,
            most=most,
            clock=self.clock,
            afresh=self.afresh,
            times_short=lambda: self.short,
            **{"patient": lambda _: nullcontext(), **options},
        )
        self.networks = Networks(tasks, loading)

    def load(self, bundle: Bundle, batch_rows: int) -> FakeModel:
        self.loads.append(bundle.id)
        self.shapes.append(batch_rows)
        if known := self.networks._models.get(bundle.id):
            self.announced.append((known.digest, known.is_lowering))
        self.alive.append(sum(of == bundle.id and made() is not None for of, made in self._made))
        if self.failures:
            raise self.failures.pop()
        digest = bundle.served_digest(replace(NUMERICS, batch_rows=batch_rows).described())
        made = Narrow(self, batch_rows=batch_rows, classes=4, digest=digest)
        self._made.append((bundle.id, weakref.ref(made)))
        return made

    def afresh(self) -> None:
        self.fresh += 1

    def use(self, *tasks: str) -> None:
        for task in tasks:
            ask(self.networks[task])

    @property
    def loaded(self) -> set[str]:
        return {task for task, model in self.networks.items() if model.is_loaded}


def ask(model: TaskModel, rows: Rows = ROWS) -> NDArray[np.int64]:
    """The votes of these rows under the digest that the task has."""
    return model.votes([rows], model.digest)


def test_everything_but_the_votes_is_known_without_loading() -> None:
    """Digest, batch, classes and padding stand before the networks do, and stay as they were."""
    shelf = Shelf(bundles("default", "pets"))
    model = shelf.networks["pets"]
    assert model.digest == bundles("pets")["pets"].served_digest(NUMERICS.described())
    assert (model.batch_rows, model.classes) == (4, 4)
    assert [model.padding(rows) for rows in (1, 4, 5)] == [3, 0, 3]
    assert shelf.loads == []
    assert ask(model).sum() == 3
    ask(model)
    assert shelf.loads == ["pets"]
    assert shelf.networks["pets"] is model


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
    gone, old = shelf.networks["a"], shelf.networks["b"]
    del tasks["a"]
    tasks["b"] = replace(tasks["b"], k=2.0)
    assert list(shelf.networks) == ["default", "b"]
    assert not gone.is_loaded
    assert shelf.networks["b"].digest != old.digest
    assert shelf.loaded == set()


def test_what_cannot_be_loaded_is_refused_for_a_while() -> None:
    """A bundle that fails says so at once for some time, by its name, and is then tried again."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = [BundleError(f"{TASKS['default'].folder.parent}/a: 'x' is missing")]
    for _ in range(3):
        with pytest.raises(
            ModelUnavailable, match="Task \"a\" cannot be loaded: a: 'x' is missing"
        ):
            shelf.use("a")
    assert shelf.loads == ["a"]
    shelf.use("default")
    shelf.clock.advance(REFUSAL_SECONDS)
    shelf.use("a")
    assert shelf.loaded == {"default", "a"}


def test_asking_for_what_is_refused_lets_nothing_go() -> None:
    """The tasks that are served keep their networks: nothing is loaded in their place."""
    shelf = Shelf(bundles("default", "a", "b", "c"))
    shelf.failures = [BundleError("'x' is missing")]
    with pytest.raises(ModelUnavailable):
        shelf.use("c")
    shelf.use("a", "b")
    with pytest.raises(ModelUnavailable):
        shelf.use("c")
    assert shelf.loaded == {"a", "b"}


def test_another_model_than_was_promised_is_refused() -> None:
    """Networks under another digest than the task's jobs were keyed with never answer."""
    shelf = Shelf(bundles("default", "a"))
    model = shelf.networks["a"]
    model.digest = "promised otherwise"
    with pytest.raises(ModelUnavailable, match="not as promised otherwi"):
        ask(model)
    assert not model.is_loaded


def test_a_task_that_goes_while_it_loads_leaves_no_networks() -> None:
    """Networks that come when their task is gone, or is another bundle, do not stay in memory."""
    tasks = bundles("default", "a", "b")
    shelf = Shelf(tasks)
    shelf.use("default")
    gone, old = shelf.networks["a"], shelf.networks["b"]
    load = shelf.networks.loading.load

    def slow(bundle: Bundle, batch_rows: int) -> SmoothedModel:
        tasks.pop("a", None)
        tasks["b"] = replace(TASKS["default"], id="b", k=2.0)
        dict(shelf.networks)
        return load(bundle, batch_rows)

    shelf.networks.loading = replace(shelf.networks.loading, load=slow)
    for model in (gone, old):
        assert ask(model).sum() == 3
        assert not model.is_loaded


def test_networks_of_a_bundle_that_changed_are_let_go() -> None:
    """The networks of what was there before go as soon as another bundle is seen."""
    tasks = bundles("default", "a")
    shelf = Shelf(tasks)
    shelf.use("a")
    old = shelf.networks["a"]
    tasks["a"] = replace(tasks["a"], k=2.0)
    assert shelf.networks["a"] is not old
    assert not old.is_loaded


def test_tasks_may_come_while_room_is_made() -> None:
    """The event loop may add a task while the compute thread looks through those there are."""
    tasks = bundles("default", "a", "b")
    shelf = Shelf(tasks)
    shelf.use("a")

    class Arriving(TaskModel):
        @property
        def kept(self) -> bool:
            tasks[f"new-{len(tasks)}"] = TASKS["default"]
            shelf.networks[f"new-{len(tasks) - 1}"]
            return True

        @kept.setter
        def kept(self, kept: bool) -> None:
            pass

    shelf.networks._models["arriving"] = Arriving(TASKS["default"], shelf.networks, kept=True)
    shelf.use("b")
    shelf.networks.unload_others(shelf.networks["b"])
    assert shelf.loaded == {"b"}


def test_a_device_of_two_minds_is_no_refusal() -> None:
    """A device that fails its check while a task is loaded is broken for every task."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = [DeviceFailed("the same rows got two answers")]
    with pytest.raises(DeviceFailed):
        shelf.use("a")


def test_too_little_room_is_made_once() -> None:
    """Where weights do not fit the other tasks' networks go, the default's stay, and it is retried
    at the same shape: nothing has been computed yet."""
    error = TooLittleMemory("stage II")
    shelf = Shelf(bundles("default", "a", "b"), most=4)
    shelf.use("default", "a")
    shelf.failures = [error]
    shelf.use("b")
    assert shelf.loaded == {"default", "b"}
    assert shelf.networks["b"].digest == digest_in(4, "b")
    assert shelf.fresh == 0
    shelf.failures = [error, error, error]
    with pytest.raises(ModelUnavailable, match="too little memory"):
        shelf.use("a")
    assert len(shelf.failures) == 1
    assert shelf.loaded == {"default"}


def digest_in(rows: int, task: str = "a") -> str:
    return bundles(task)[task].served_digest(replace(NUMERICS, batch_rows=rows).described())


SHORT = {
    "said": (torch.OutOfMemoryError("CUDA out of memory."), True),
    "on the host": (MemoryError(), False),
    "in other words": (RuntimeError("GET was unable to find an engine to execute this"), True),
    "unsaid": (None, True),
}


@pytest.mark.parametrize("how", SHORT)
def test_memory_that_runs_out_lowers_the_shape(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is counted of the batch, nor is it tried again at that shape, whether or not an error
    says so; the networks are loaded for the smaller one, those from before gone, before its digest
    is announced; the calls after it have another thread; and the log has the cause."""
    shelf = Shelf(bundles("default", "a", "b"), most=4)
    shelf.use("default", "a", "b")
    model, told = shelf.networks["a"], metrics.SHAPES_LOWERED._value.get()
    (shelf.error, shelf.counts), shelf.room = SHORT[how], 3
    with pytest.raises(ShapeLowered, match="'a' is served under another digest"):
        ask(model)
    assert (model.digest, model.batch_rows, model.padding(3)) == (digest_in(2), 2, 1)
    assert metrics.SHAPES_LOWERED._value.get() == told + 1
    assert shelf.shapes == [4, 4, 4, 2]
    assert shelf.announced[-1] == (digest_in(4), True)
    assert shelf.alive[-1] == 0
    assert shelf.fresh == 1
    assert not model.is_lowering
    assert shelf.loaded == {"default", "a"}
    assert shelf.networks["default"].digest == digest_in(4, "default")
    assert ask(model, replace(ROWS, stop=2)).sum() == 2
    assert model.digest == digest_in(2)
    assert str(shelf.error or "caught by a library") in caplog.text


def test_another_bundle_of_a_task_begins_at_the_usual_shape() -> None:
    """A task that is made anew, or read anew, is another model, and memory may be there by then."""
    tasks = bundles("default", "a")
    shelf = Shelf(tasks)
    shelf.use("a")
    shelf.room = 3
    with pytest.raises(ShapeLowered):
        shelf.use("a")
    assert shelf.networks["a"].digest == digest_in(2)
    tasks["a"] = replace(tasks["a"])
    assert shelf.networks["a"].digest == digest_in(4)


def test_an_error_beside_memory_is_no_want_of_it() -> None:
    """What a library says of itself is taken for short memory only where memory was short."""
    shelf = Shelf(bundles("default", "a"))
    shelf.use("a")
    shelf.error, shelf.counts, shelf.room = (
        RuntimeError("GET was unable to find an engine"),
        False,
        3,
    )
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        shelf.use("a")
    assert shelf.networks["a"].digest == digest_in(4)


def test_below_the_smallest_batch_the_process_ends() -> None:
    """No digest is left under which the default task, which must be served, may answer."""
    shelf = Shelf(bundles("default"))
    shelf.use("default")
    shelf.room = 1
    with pytest.raises(ShapeLowered):
        shelf.use("default")
    with pytest.raises(DeviceFailed, match="a batch of 2 rows does not fit"):
        ask(shelf.networks["default"], replace(ROWS, stop=2))


def test_below_the_smallest_batch_another_task_is_refused() -> None:
    """It alone: its networks go, and once they are tried again they load at the smallest shape."""
    shelf = Shelf(bundles("default", "a"))
    shelf.use("default", "a")
    shelf.room = 1
    with pytest.raises(ShapeLowered):
        shelf.use("a")
    model = shelf.networks["a"]
    with pytest.raises(ModelUnavailable, match=r'"a" .* a batch of 2 rows does not fit'):
        ask(model, replace(ROWS, stop=2))
    assert (shelf.loaded, model.digest, model.is_lowering) == ({"default"}, digest_in(2), False)
    shelf.room = 99
    shelf.clock.advance(REFUSAL_SECONDS)
    assert ask(model, replace(ROWS, stop=2)).sum() == 2


@pytest.mark.parametrize("error", [TooLittleMemory("stage II"), BundleError("the volume is gone")])
def test_a_lowering_that_cannot_load_ends_the_process(error: Exception) -> None:
    """What was computed before may not be gone on with, and the default task's networks are never
    left unloaded."""
    shelf = Shelf(bundles("default"))
    shelf.use("default")
    shelf.room, shelf.failures = 3, [error, error]
    with pytest.raises(DeviceFailed, match=f"memory ran out for a batch, and then: .*{error}"):
        shelf.use("default")
    assert not shelf.networks["default"].is_lowering


@pytest.mark.parametrize("error", [TooLittleMemory("stage II"), BundleError("the folder is gone")])
def test_a_task_that_cannot_be_lowered_is_refused_alone(error: Exception) -> None:
    """The process goes on with the others. Nothing is kept of the networks that memory ran out
    under; once they are tried again they load at their shape, in another thread."""
    shelf = Shelf(bundles("default", "a"))
    shelf.use("default", "a")
    shelf.room, shelf.failures = 3, [error, error]
    model = shelf.networks["a"]
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match=f'Task "a" cannot be loaded: .*{error}'):
            ask(model)
    assert (shelf.loaded, model.digest, model.is_lowering) == ({"default"}, digest_in(4), False)
    assert shelf.fresh == 1
    shelf.room, shelf.failures = 99, []
    shelf.use("default")
    shelf.clock.advance(REFUSAL_SECONDS)
    assert ask(model).sum() == 3
    assert shelf.shapes[-1] == 4


async def test_a_task_that_cannot_be_lowered_ends_no_other_job() -> None:
    """Where the folder of a task is removed as it runs out of memory, its job fails after its
    attempts with the reason, and the default task's jobs are answered by the same worker."""
    shelf = Shelf(bundles("default", "a"))
    shelf.use("default", "a")
    digests = {task: model.digest for task, model in shelf.networks.items()}
    load, full = shelf.load, Shelf(bundles("a"))
    full.room = 3
    shelf.networks["a"]._loaded.shelf = full  # type: ignore[union-attr]

    def removed(bundle: Bundle, rows: int) -> FakeModel:
        if bundle.id == "a":
            raise BundleError("a: there is no manifest.json")
        return load(bundle, rows)

    shelf.networks.loading = replace(
        shelf.networks.loading,
        load=removed,  # type: ignore[arg-type]
        times_short=lambda: full.short,
    )
    engine = MemoryEngine(shard_rows=10, lease_seconds=60, poll_seconds=0.01)
    await engine.pull(Worker("someone", digests), 1)
    job = make_job("a", task="a", bundle=digests["a"], classes=4)
    others = [make_job(f"job-{n}", bundle=digests["default"], classes=4, n=400) for n in range(3)]
    for one in (job, *others):
        await engine.submit(one)
    async with working(engine, shelf.networks) as hall:
        status = await final(engine, "a")
        for other in others:
            await assert_exact(engine, other)
        assert not hall.task.done()
    assert status.problem is not None
    assert status.problem["type"] == "urn:vouchsafe:problem:task-unusable"
    assert "there is no manifest.json" in status.problem["detail"]


async def test_another_worker_finishes_what_one_cannot_go_on_with() -> None:
    """Of two workers of one digest, one runs out of memory and cannot be lowered: it ends, and the
    other answers every job."""
    shelf, digest = Shelf(bundles("default")), digest_in(4, "default")
    engine = MemoryEngine(shard_rows=10, lease_seconds=60, poll_seconds=0.01)
    healthy = FakeModel(batch_rows=4, classes=4, digest=digest)
    healthy.gate.clear()
    jobs = [make_job(f"job-{number}", bundle=digest, classes=4) for number in range(20)]
    await engine.pull(Worker("someone", {"default": digest}), 1)
    for job in jobs:
        await engine.submit(job)
    shelf.use("default")
    shelf.room, shelf.failures = 3, [BundleError("the volume is gone")]
    async with (
        working(engine, {"default": healthy}, worker_id="healthy"),
        working(engine, shelf.networks, worker_id="ill") as ill,
    ):
        with pytest.raises(DeviceFailed, match="the volume is gone"):
            await ill.ends()
        healthy.gate.set()
        for job in jobs:
            await assert_exact(engine, job)


def test_rows_of_another_digest_are_not_computed() -> None:
    """A batch that was cut before the shape was lowered is not counted under the new digest."""
    shelf = Shelf(bundles("default", "a"))
    with pytest.raises(ShapeLowered):
        shelf.networks["a"].votes([ROWS], digest_in(2))
    assert shelf.loads == []


def test_networks_too_large_for_the_shape_are_loaded_for_a_smaller_one() -> None:
    """Where loading itself runs out of memory the shape is lowered before anything is answered:
    rows asked for under the digest that was promised are not counted under the new one."""
    short = torch.OutOfMemoryError("CUDA out of memory.")
    shelf = Shelf(bundles("default", "a", "b"))
    shelf.use("b")
    shelf.failures = [short]
    model = shelf.networks["a"]
    with pytest.raises(ShapeLowered):
        ask(model)
    assert shelf.shapes == [4, 4, 2]
    assert shelf.announced[1:] == [(digest_in(4), False)] * 2
    assert (model.digest, model.is_loaded, shelf.loaded) == (digest_in(2), True, {"a"})
    shelf.failures = [short]
    shelf.networks["default"].loaded()
    assert shelf.networks["default"].digest == digest_in(2, "default")


def test_memory_that_runs_out_unsaid_in_loading_lowers_too() -> None:
    """Networks that were warmed while a library went another way, or that then had two minds, are
    not those of the digest."""
    shelf = Shelf(bundles("default", "a"))
    load, errors = shelf.load, [DeviceFailed("the same rows got two answers"), None]

    def short(bundle: Bundle, rows: int) -> FakeModel:
        made = load(bundle, rows)
        if rows == 4:
            shelf.short += 1
            if error := errors.pop():
                raise error
        return made

    shelf.networks.loading = replace(shelf.networks.loading, load=short)  # type: ignore[arg-type]
    for task in ("a", "default"):
        with pytest.raises(ShapeLowered):
            shelf.use(task)
        assert shelf.networks[task].digest == digest_in(2, task)
    assert (shelf.fresh, shelf.alive) == (2, [0, 0, 0, 0])


@pytest.mark.parametrize("failures", [[TooLittleMemory("stage II")] * 2, [MemoryError()] * 2])
def test_weights_that_do_not_fit_leave_the_shape(failures: list[Exception]) -> None:
    """A smaller shape is no help where the weights alone are too much: the digest stays, and the
    task is refused for a while."""
    shelf = Shelf(bundles("default", "a"))
    shelf.failures = list(failures)
    with pytest.raises(ModelUnavailable, match="too little memory"):
        shelf.use("a")
    assert shelf.failures == []
    assert shelf.networks["a"].digest == digest_in(4)
    shelf.clock.advance(REFUSAL_SECONDS)
    shelf.use("a")


def test_what_other_workers_may_load_is_refused_until_it_is_loaded() -> None:
    """In a fleet it is to be tried again after a while, and after twice as long each time; a single
    process withholds nothing, for nobody else could answer."""
    for in_fleet in (True, False):
        shelf = Shelf(bundles("default", "a"), in_fleet=in_fleet)
        model, error = shelf.networks["a"], BundleError("'x' is missing")
        shelf.failures = [error] * 7
        waits = []
        while shelf.failures:
            with pytest.raises(ModelUnavailable):
                model.loaded()
            began = shelf.clock()
            while not model.is_due if in_fleet else shelf.clock() < began + REFUSAL_SECONDS:
                assert model.is_refused == in_fleet
                shelf.clock.advance(1)
            waits.append(shelf.clock() - began)
        assert waits == ([30, 60, 120, 240, 300, 300, 300] if in_fleet else [30] * 7)
        model.loaded()
        assert not model.is_refused
        assert not model.is_due
        model.unload()
        shelf.failures = [error]
        with pytest.raises(ModelUnavailable):
            model.loaded()
        shelf.clock.advance(REFUSAL_SECONDS)
        assert model.is_due == in_fleet


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
    load = shelf.load
    slow: Callable[[Bundle, int], FakeModel] = lambda *asked: (gate.wait(), load(*asked))[1]  # noqa: E731
    shelf.networks.loading = replace(shelf.networks.loading, load=slow)  # type: ignore[arg-type]
    model = shelf.networks["a"]
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
    load_and_warm(bundle, 16, runtime=Torch(), lanes=0)
    sample = Shelf({"default": bundle}).networks["default"].sample
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
    load = partial(load_and_warm, runtime=Torch(), lanes=1, models_dir=tmp_path)
    networks = Networks({"pets": bundle}, Loading(load, NUMERICS, 1, 1, lambda _: nullcontext()))
    with pytest.raises(ModelUnavailable, match=r"'unet/config.json' does not have the hash"):
        ask(networks["pets"])
