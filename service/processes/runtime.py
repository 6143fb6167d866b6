"""Networks, compute thread and worker of one machine, for either engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from models.bundle import DEFAULT_TASK, Bundle, BundleError, read_bundle
from models.demonstrations.pictures import Demonstrated, attack, show_rows
from models.memory import check_headroom
from models.rows import Rows
from models.runtime import AUTO, Runtime, Torch
from models.smoothing import (
    SmoothedModel,
    best_device,
    best_dtype,
    instead_of,
    load,
    named_runtime,
    numerics,
)
from service.config import Settings
from service.engine.connection import ConnectionState
from service.engine.protocol import Engine
from service.operations.logs import naming
from service.tasks.catalog import Catalog
from service.worker.batch_shape import BatchShapes
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.loop import work
from service.worker.model import ModelUnavailable, warm_up
from service.worker.model_cache import ModelCache

logger = logging.getLogger("vouchsafe")


class WorkerRuntime:
    """The tasks of this machine and the one worker that serves them.

    `runtime` overrides the settings' runtime. `tasks` are the default one and those published in
    the data directory. `models` has a model for each task, which loads at its first use. `failed`
    is True once the worker has ended by an error.

    Raises RuntimeUnavailable where this machine cannot run networks in that runtime, and
    BundleError for a damaged default task.
    """

    def __init__(self, settings: Settings, runtime: Runtime | None = None) -> None:
        self._is_automatic = runtime is None and settings.runtime == AUTO
        runtime = runtime or named_runtime(settings.runtime)
        device = best_device()
        runtime.weights_dtype(device, best_dtype(device))
        self.settings = settings
        self.tasks = Catalog(
            {"default": read_bundle(DEFAULT_TASK)}, settings.tasks_folder, settings.models_folder
        )
        self.thread = ComputeThread()
        self._runtime = runtime
        self.models = self._model_cache()
        self.failed = False

    def _model_cache(self) -> ModelCache:
        chosen, cpu_threads = numerics(self._runtime)
        settings = self.settings
        load_one = partial(
            load_and_warm,
            runtime=self._runtime,
            cpu_threads=cpu_threads,
            models_dir=settings.models_folder,
            beside_adaptation=settings.redis_url is None or settings.run_adaptation_jobs,
        )
        return ModelCache(
            self.tasks,
            BatchShapes(load_one, chosen.batch_rows),
            chosen,
            cpu_threads,
            settings.model_cache_size,
            self.thread.patient,
            partial(demonstrate, runtime=self._runtime, models_dir=settings.models_folder),
        )

    def waiting_for(self) -> str:
        """The reason why this machine cannot serve yet; empty where it can."""
        if not self.thread.healthy:
            return "the device hangs or is broken"
        if not self.models["default"].is_loaded:
            return "the default task's networks are not loaded yet"
        return ""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context for the worker's run, once: sets `failed` after an error, closes the thread."""
        try:
            yield
        except Exception:
            self.failed = True
            raise
        finally:
            self.thread.close()

    async def load_default(self, stop: asyncio.Event) -> None:
        """Load and warm the default task's networks; returns early at `stop`.

        Where an automatically chosen runtime cannot run them, torch replaces it before the worker
        announces any task.

        Raises ModelUnavailable where they cannot be loaded, and DeviceFailed where they give the
        same rows different labels.
        """
        try:
            await self._load_default(stop)
        except ModelUnavailable as error:
            cause = error.__cause__ or error
            is_settled = not self._is_automatic or isinstance(self._runtime, Torch)
            if is_settled or isinstance(cause, BundleError):
                raise
            self._runtime = instead_of(self._runtime, self.tasks["default"], cause)
            self.models = self._model_cache()
            await self._load_default(stop)

    async def _load_default(self, stop: asyncio.Event) -> None:
        loading = asyncio.ensure_future(self.thread.run(self.models["default"].loaded))
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
        finally:
            loading.cancel()
            stopping.cancel()

    async def work(
        self,
        engine: Engine,
        worker_id: str,
        stop: asyncio.Event,
        connection_state: ConnectionState | None = None,
    ) -> None:
        """Work for `engine` until `stop`; see `service.worker.loop.work`."""
        if not stop.is_set():
            await work(
                engine,
                self.models,
                worker_id=worker_id,
                stop=stop,
                thread=self.thread,
                lease_seconds=self.settings.lease_seconds,
                connection_state=connection_state,
            )


def leave(status: int) -> NoReturn:
    """Exit at once; the interpreter's own exit waits for every thread, a hung one included."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_if_hung(serving: WorkerRuntime) -> None:
    """Exit with 1 where the worker failed, and with 0 where only its thread still runs."""
    if serving.failed or serving.thread.busy:
        leave(1 if serving.failed else 0)


def load_and_warm(
    bundle: Bundle,
    batch_rows: int,
    *,
    runtime: Runtime,
    cpu_threads: int,
    models_dir: Path | None = None,
    beside_adaptation: bool = False,
) -> SmoothedModel:
    """The warmed networks of a bundle, for batches of at most `batch_rows` rows.

    Checks that a row's label does not depend on its place in the batch or on the other rows. The
    networks compute one whole batch in each thread, for which they need the most memory.

    Raises DeviceFailed where the label depends on them: such a device must not certify. Raises
    BundleError where the bundle is no longer the verified one, and MemoryError where the largest
    batch leaves no headroom.
    """
    with _uncollected():
        model = load(
            bundle,
            batch_rows=batch_rows,
            runtime=runtime,
            cpu_threads=cpu_threads,
            models_dir=models_dir,
        )
        rows = batch_rows * max(1, cpu_threads)
        quarter = max(1, rows // 4)
        one, two, three = warm_up(bundle.resolution, quarter, rows - quarter)
        first, second = model.labels([one, two]), model.labels([three, one])
    if not np.array_equal(first[:quarter], second[-quarter:]):
        raise DeviceFailed(
            f"task {bundle.id!r}: the same rows got different labels in another batch; "
            "replace the device"
        )
    check_headroom(best_device(), beside_adaptation=beside_adaptation)
    logger.info(
        "serving task %s as %s; licenses: %s",
        bundle.id,
        model.digest[:16],
        bundle.licence,
        extra=naming(task_id=bundle.id),
    )
    return model


def demonstrate(
    bundle: Bundle,
    model: SmoothedModel,
    rows: Rows,
    epsilon: float | None,
    *,
    runtime: Runtime,
    models_dir: Path | None = None,
) -> Demonstrated:
    """A demonstration on a bundle's networks, `model` as they are served by `runtime`.

    An attack needs gradients. Where the runtime gives none, the networks are loaded once more, by
    torch in float32, and dropped at the end.

    Raises what `show_rows`, `attack` and `load` raise.
    """
    if epsilon is None:
        return show_rows(model, rows)
    if not isinstance(runtime, Torch):
        model = load(
            bundle, runtime=Torch(), dtype=torch.float32, cpu_threads=0, models_dir=models_dir
        )
    return attack(model, rows, epsilon)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A context without garbage collection: imports and weights stay, and repeated scans of them
    take a second of nano's start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
