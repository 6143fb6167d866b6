"""Pulls a worker's shards: at once where it has none, in advance while a batch computes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from service.engine.connection import EngineConnection
from service.engine.limits import distinct
from service.engine.protocol import Engine, Worker
from service.worker.in_flight import InFlight
from service.worker.model import Model
from service.worker.reporter import Reporter


class Prefetcher:
    """Fills `in_flight` with the rows of one batch; each pull announces the worker's tasks.

    At most one pull runs at a time. `last_task` is the task that a pull prefers.
    """

    def __init__(
        self,
        engine: Engine,
        connection: EngineConnection,
        models: Mapping[str, Model],
        worker_id: str,
        in_flight: InFlight,
        reporter: Reporter,
    ) -> None:
        self.last_task: str | None = None
        self.pulling: asyncio.Task[None] | None = None
        self._engine = engine
        self._connection = connection
        self._models = models
        self._worker_id = worker_id
        self._in_flight = in_flight
        self._reporter = reporter
        self._until = 0.0

    def begin(self, seconds: float) -> None:
        """Pull beside a batch, for at most `seconds`."""
        self._until = time.monotonic() + seconds
        if self.pulling is None:
            self.pulling = asyncio.create_task(self._prefetch())

    def end(self) -> None:
        """Begin no more pulls; a running pull continues."""
        self._until = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether there is a result to `finish`."""
        return self.pulling is not None and self.pulling.done()

    async def finish(self) -> None:
        """Wait for the running pull, if any.

        Raises what the pull raised.
        """
        pulling, self.pulling = self.pulling, None
        if pulling is not None:
            await pulling

    async def pull(self) -> None:
        """Wait for the running pull, or pull once.

        Raises what the pull raised.
        """
        if self.pulling is not None:
            await self.finish()
        else:
            await self._pull()

    async def announce(self) -> None:
        """Announce the worker without leasing a shard."""
        await self._connection.ask(self._engine.pull(self._worker(), 0))

    @property
    def _missing_rows(self) -> int:
        max_rows = max((model.batch_rows for model in self._models.values()), default=1)
        return max_rows - self._in_flight.rows

    async def _prefetch(self) -> None:
        while time.monotonic() < self._until and self._missing_rows > 0:
            await self._pull()

    def _worker(self) -> Worker:
        models = dict(self._models)
        bundles = {task: model.digest for task, model in models.items() if model.is_available}
        numerics = distinct(model.numerics.described() for model in models.values())
        return Worker(self._worker_id, bundles, numerics)

    async def _pull(self) -> None:
        began, rows = time.monotonic(), max(1, self._missing_rows)
        leases = await self._connection.ask(self._engine.pull(self._worker(), rows, self.last_task))
        stale = []
        for lease in leases:
            model = self._models.get(lease.job.task)
            if model is None or model.digest != lease.job.bundle or not model.is_available:
                stale.append(lease)  # The task changed during the pull.
            elif lease.job.classes != model.classes:  # No worker of the digest can compute it.
                reason = f"a job of {lease.job.classes} classes for a task of {model.classes}"
                self._reporter.fail(lease, ValueError(reason))
            else:
                self._in_flight.add(lease, model, began)
        self._reporter.release(stale)
