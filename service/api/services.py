"""The objects behind the endpoints: built once in a process, started and closed with its app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from service.background import BackgroundTask, BackgroundTasks
from service.config import Settings
from service.engine.protocol import Engine
from service.operations.health import Health
from service.predictions.batches.service import Batches
from service.predictions.service import Predictions
from service.signing import SigningKeys
from service.tasks.catalog import Catalog
from service.tasks.lock import LocalLocks, Locks
from service.tasks.service import TaskService
from service.tasks.store import Store

FOLLOWING_SECONDS = 1.0
"""How long the catalog's watch, the looks and the batches may take to end at shutdown."""


@dataclass(frozen=True, slots=True)
class Services:
    """One process's services; `callers` maps the SHA-256 of a key to its owner's name."""

    settings: Settings
    engine: Engine
    predictions: Predictions
    batches: Batches
    tasks: TaskService
    health: Health
    callers: Mapping[bytes, str]
    keys: SigningKeys
    background: Sequence[BackgroundTasks]

    @classmethod
    def build(
        cls,
        settings: Settings,
        engine: Engine,
        catalog: Catalog,
        secret: bytes,
        keys: SigningKeys,
        background_tasks: Sequence[BackgroundTask] = (),
        batch_locks: Locks | None = None,
    ) -> Self:
        """Services over an engine; `catalog` maps the `task` of a request to its bundle.

        `background_tasks` run for the app's lifetime. Each is called with an event that is set at
        shutdown, and has `lease_seconds` to end then. `batch_locks` exclude the other processes of
        a fleet from a batch.
        """
        store = Store(settings, secret)
        tasks = TaskService(store, catalog)
        predictions = Predictions(settings, engine, catalog, secret, keys, tasks.expect)
        locks = batch_locks or LocalLocks()
        batches = Batches(settings, predictions, keys, secret, locks.acquire)
        running = BackgroundTasks(background_tasks, settings.lease_seconds)
        follow = partial(catalog.follow, gone=predictions.cancel_stale)
        health = Health(
            engine,
            catalog,
            running,
            open_jobs=store.open_jobs,
            workers_elsewhere=settings.redis_url is not None,
        )
        following: list[BackgroundTask] = [follow, predictions.keep_looking, batches.run]
        return cls(
            settings,
            engine,
            predictions,
            batches,
            tasks,
            health,
            settings.callers(),
            keys,
            background=(running, BackgroundTasks(following, FOLLOWING_SECONDS)),
        )

    def start(self) -> None:
        """Start the background tasks."""
        for tasks in self.background:
            tasks.start()

    async def close(self) -> None:
        """Stop the background tasks, then close predictions and engine."""
        for tasks in self.background:
            await tasks.stop()
        await self.predictions.close()
        await self.engine.close()
