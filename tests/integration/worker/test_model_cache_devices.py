"""service/worker/model_cache.py: devices, their memory, and real networks."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.bundle import DEFAULT_TASK, MODELS, read_bundle
from models.memory import (
    ADAPTATION_SHARE,
    cap_adaptation,
    check_headroom,
    let_go_of,
    ran_out,
    times_short,
)
from models.runtime import Torch
from models.smoothing import Rows
from service.processes import runtime as serving
from service.processes.runtime import load_and_warm
from service.worker.batch_shape import BatchShapes
from service.worker.compute import ComputeThread
from service.worker.model import ModelUnavailable
from service.worker.model_cache import ModelCache
from tests.support.fakes import FakeModel
from tests.support.shelf import NUMERICS, ROWS, Shelf, ask, bundles, fake_demonstration

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
        {"pets": bundle},
        BatchShapes(load, 4),
        NUMERICS,
        1,
        1,
        lambda _: nullcontext(),
        fake_demonstration,
    )
    with pytest.raises(ModelUnavailable, match=r"'unet/config.json' does not have the hash"):
        ask(cache["pets"])
