"""The embedded default: engine, worker and networks in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from models.runtime import Runtime
from service.api.services import Services
from service.background import BackgroundTask
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Capacity
from service.errors import TaskUnusable
from service.processes.runtime import WorkerRuntime
from service.processes.runtime import leave_if_hung as leave_if_hung
from service.secrets import load_secret
from service.signing import SigningKeys
from service.tasks.store import Store
from service.worker.compute import DeviceFailed
from service.worker.model import ModelUnavailable

UNSERVED_SECONDS = 5.0
"""Seconds until a job fails that the one worker does not serve: a removed task's jobs are cancelled
before."""


class Embedded(WorkerRuntime):
    """Engine, tasks, secret and worker of one machine.

    `runtime` overrides the settings' runtime.

    Raises RuntimeUnavailable where this machine cannot run networks in that runtime.
    """

    def __init__(self, settings: Settings, runtime: Runtime | None = None) -> None:
        super().__init__(settings, runtime)
        self.secret = load_secret(settings.data_dir, settings.noise_secret_file)
        self.keys = SigningKeys.from_settings(settings, self.secret)
        self.store = Store(settings, self.secret)
        options = EngineOptions.from_settings(settings)
        self.engine = MemoryEngine(replace(options, unserved_seconds=UNSERVED_SECONDS))

    async def load(self, task: str) -> None:
        """Load a task's networks, and return once the worker serves the task under their digest.

        Raises TaskUnusable where the networks cannot be loaded, or the device fails.
        """
        try:
            await self.thread.run(self.models[task].loaded)
        except (ModelUnavailable, DeviceFailed) as error:
            raise TaskUnusable(str(error)) from error
        await self.ready()

    def services(self, background_tasks: Sequence[BackgroundTask]) -> Services:
        """The services of this process's API, with its background tasks."""
        return Services.build(
            self.settings, self.engine, self.tasks, self.secret, self.keys, background_tasks
        )

    async def ready(self) -> None:
        """Return once the worker serves every available task."""
        while not self._is_served(await self.engine.capacity()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    def _is_served(self, capacity: Capacity) -> bool:
        return all(
            model.digest in capacity.digests.get(task, ())
            for task, model in self.models.items()
            if model.is_available
        )

    def worker(self, on_failure: Callable[[], None]) -> BackgroundTask:
        """A background task of the API: loads the default task, then works until the stop event.

        Sets `failed` and calls `on_failure` where loading fails or the device breaks.
        """

        async def run(stop: asyncio.Event) -> None:
            try:
                with self.in_use():
                    await self.load_default(stop)
                    await self.work(self.engine, f"embedded-{os.getpid()}", stop)
            except Exception:
                on_failure()
                raise

        return run
