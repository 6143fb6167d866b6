"""The embedded default: engine, worker and networks in one process, and nothing else installed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial

import numpy as np

from models.bundle import DEFAULT_TASK, Bundle, BundleError, read_bundle
from models.runtime import RUNTIMES, Runtime
from models.smoothing import Rows, SmoothedModel, best_device, best_dtype, load, numerics
from service.config import Settings, load_secret
from service.device import ComputeThread, DeviceFailed
from service.engine_memory import MemoryEngine
from service.health import Companion
from service.loading import Loading, Networks
from service.tasks.catalogue import Catalogue
from service.tasks.store import Store
from service.worker import work

logger = logging.getLogger("vouchsafe")


class Embedded:
    """Everything an answer needs, on one machine: `engine`, `tasks`, `secret` and a worker.

    `tasks` are the default one and those in `store`; `models` has a model for each, which loads at
    its first use. `runtime` stands in for the settings' own. Raises RuntimeUnavailable where this
    machine cannot run networks so.
    """

    def __init__(self, settings: Settings, runtime: Runtime | None = None) -> None:
        self.settings = settings
        runtime = runtime or RUNTIMES[settings.runtime]()
        device = best_device()
        runtime.weights_dtype(device, best_dtype(device))
        self.secret = load_secret(settings.data_dir)
        self.store = Store(settings, self.secret)
        self.tasks = Catalogue({"default": read_bundle(DEFAULT_TASK)}, self.store.tasks)
        self._thread = ComputeThread()
        chosen, lanes = numerics(runtime)
        load_one = partial(_load_and_warm, runtime=runtime, lanes=lanes)
        self.models = Networks(
            self.tasks,
            Loading(load_one, chosen, lanes, settings.loaded_tasks, self._thread.patient),
        )
        self.engine = MemoryEngine(
            shard_rows=settings.shard_rows,
            lease_seconds=settings.lease_seconds,
            backlog_rows=settings.backlog_rows,
            owner_rows=settings.key_rows,
            retention_seconds=settings.retention_seconds,
            worker_seconds=max(30.0, settings.lease_seconds),
        )
        self.failed = False

    async def ready(self) -> None:
        """Returns once the worker serves every task."""
        while self.tasks.keys() - (await self.engine.capacity()).bundles.keys():  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    def worker(self, on_failure: Callable[[], None]) -> Companion:
        """A companion of the app: loads and warms the default task, then works until stopped.

        Where loading fails or the device breaks, `failed` is set and `on_failure` called; it is
        also set where a hung call is left behind, which the interpreter would wait for.
        """

        async def run(stop: asyncio.Event) -> None:
            thread = self._thread
            try:
                await thread.run(self.models["default"].loaded)
                await work(
                    self.engine,
                    self.models,
                    worker_id=f"embedded-{os.getpid()}",
                    stop=stop,
                    thread=thread,
                    lease_seconds=self.settings.lease_seconds,
                )
            except Exception:
                self.failed = True
                on_failure()
                raise
            finally:
                self.failed = self.failed or thread.busy
                thread.close()

        return run


def leave_if_hung(embedded: Embedded) -> None:
    """Exit with 1 where the worker failed: a hung device's thread would keep the interpreter."""
    if embedded.failed:
        os._exit(1)


def _load_and_warm(bundle: Bundle, *, runtime: Runtime, lanes: int) -> SmoothedModel:
    """Networks that label rows alike in another place of the batch, beside other companions.

    Raises DeviceFailed where they do not: such a device must not certify anything. Raises
    BundleError where the bundle is no longer the one that was verified.
    """
    if read_bundle(bundle.folder).digest != bundle.digest:
        raise BundleError(f"{bundle.folder}: has changed since it was found")
    model = load(bundle, runtime=runtime, lanes=lanes)
    shape, half = (3, bundle.resolution, bundle.resolution), model.batch_rows // 2
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)
    one, two, three = (Rows(image, bytes(32), 0, half, 0.25) for image in images)
    first, second = model.labels([one, two]), model.labels([three, one])
    if not np.array_equal(first[:half], second[half:]):
        raise DeviceFailed(f"task {bundle.id!r}: the same rows got two answers")
    logger.info("serving task %s as %s; licences: %s", bundle.id, model.digest[:16], bundle.licence)
    return model
