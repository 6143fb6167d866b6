"""What serves tasks on a machine, whatever the engine: networks, their thread, and the worker."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from models.memory import check_headroom
from models.runtime import RUNTIMES, Runtime
from models.smoothing import SmoothedModel, best_device, best_dtype, load, numerics
from service.config import Settings
from service.engine.connection import Outage
from service.engine.protocol import Engine
from service.operations.logs import naming
from service.tasks.catalog import Catalogue
from service.worker.batch_shape import BatchShapes
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.loop import work
from service.worker.model import warm_up
from service.worker.model_cache import ModelCache

logger = logging.getLogger("vouchsafe")


class Serving:
    """The tasks of this machine and the one worker that answers for them.

    `tasks` are the default one and those published in the data directory; `models` has a model for
    each, which loads at its first use. `runtime` stands in for the settings' own. `failed` is set
    where the worker has ended by an error. Raises RuntimeUnavailable where this machine cannot run
    networks so, and BundleError for a damaged default task.
    """

    def __init__(self, settings: Settings, runtime: Runtime | None = None) -> None:
        runtime = runtime or RUNTIMES[settings.runtime]()
        device = best_device()
        runtime.weights_dtype(device, best_dtype(device))
        self.settings = settings
        self.tasks = Catalogue(
            {"default": read_bundle(DEFAULT_TASK)}, settings.tasks_folder, settings.models_folder
        )
        self.thread = ComputeThread()
        chosen, lanes = numerics(runtime)
        load_one = partial(
            load_and_warm,
            runtime=runtime,
            lanes=lanes,
            models_dir=settings.models_folder,
            beside_adaptation=settings.redis_url is None or settings.adapt,
        )
        self.models = ModelCache(
            self.tasks,
            BatchShapes(load_one, chosen.batch_rows),
            chosen,
            lanes,
            settings.loaded_tasks,
            self.thread.patient,
        )
        self.failed = False

    def waiting_for(self) -> str:
        """What keeps this machine from answering; empty when nothing does."""
        if not self.thread.healthy:
            return "the device hangs or is broken"
        if not self.models["default"].is_loaded:
            return "the default task's networks are not loaded yet"
        return ""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Where the worker runs, once: sets `failed` for an error and takes no more calls after."""
        try:
            yield
        except Exception:
            self.failed = True
            raise
        finally:
            self.thread.close()

    async def load_default(self, stop: asyncio.Event) -> None:
        """Load and warm the default task's networks; on `stop` they are left to load for nobody.

        Raises ModelUnavailable where they cannot be loaded and DeviceFailed where they do not
        label alike.
        """
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
        self, engine: Engine, worker_id: str, stop: asyncio.Event, outage: Outage | None = None
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
                outage=outage,
            )


def leave(status: int) -> NoReturn:
    """Exit at once: the interpreter would wait for every thread, and for a hung one for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def leave_if_hung(serving: Serving) -> None:
    """Exit with 1 where the worker failed, and with 0 where its thread alone is left behind."""
    if serving.failed or serving.thread.busy:
        leave(1 if serving.failed else 0)


def load_and_warm(
    bundle: Bundle,
    batch_rows: int,
    *,
    runtime: Runtime,
    lanes: int,
    models_dir: Path | None = None,
    beside_adaptation: bool = False,
) -> SmoothedModel:
    """Networks that label rows alike in another place of the batch, beside other companions.

    Raises DeviceFailed where they do not: such a device must not certify anything. Raises
    BundleError where the bundle is no longer the one that was verified, and MemoryError where the
    largest batch fits without headroom only.
    """
    model = load(bundle, batch_rows=batch_rows, runtime=runtime, lanes=lanes, models_dir=models_dir)
    half = model.batch_rows // 2
    one, two, three = warm_up(bundle.resolution, half)
    first, second = model.labels([one, two]), model.labels([three, one])
    if not np.array_equal(first[:half], second[half:]):
        raise DeviceFailed(f"task {bundle.id!r}: the same rows got two answers")
    check_headroom(best_device(), beside_adaptation=beside_adaptation)
    served, told = model.digest[:16], naming(task_id=bundle.id)
    logger.info(
        "serving task %s as %s; licences: %s", bundle.id, served, bundle.licence, extra=told
    )
    return model
