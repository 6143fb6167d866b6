"""The embedded default: engine, worker and networks in one process, and nothing else installed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from models.runtime import Runtime
from service.background import BackgroundTask
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.protocol import Capacity
from service.processes.runtime import Serving
from service.processes.runtime import leave_if_hung as leave_if_hung
from service.secrets import load_secret
from service.tasks.store import Store


class Embedded(Serving):
    """Everything an answer needs, on one machine: `engine`, `tasks`, `secret` and a worker.

    `runtime` stands in for the settings' own. Raises RuntimeUnavailable where this machine cannot
    run networks so.
    """

    def __init__(self, settings: Settings, runtime: Runtime | None = None) -> None:
        super().__init__(settings, runtime)
        self.secret = load_secret(settings.data_dir, settings.noise_secret_file)
        self.store = Store(settings, self.secret)
        self.engine = MemoryEngine(
            shard_rows=settings.shard_rows,
            lease_seconds=settings.lease_seconds,
            backlog_rows=settings.backlog_rows,
            owner_rows=settings.key_rows,
            retention_seconds=settings.retention_seconds,
            kept_jobs=settings.kept_jobs,
            worker_seconds=max(30.0, settings.lease_seconds),
        )

    async def ready(self) -> None:
        """Returns once the worker serves every task."""
        while not self._is_served(await self.engine.capacity()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    def _is_served(self, capacity: Capacity) -> bool:
        return all(capacity.digests_of(task, bundle) for task, bundle in self.tasks.items())

    def worker(self, on_failure: Callable[[], None]) -> BackgroundTask:
        """A background task of the app: loads and warms the default task, then works until stopped.

        Where loading fails or the device breaks, `failed` is set and `on_failure` called.
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
