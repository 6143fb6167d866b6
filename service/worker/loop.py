"""Worker loop: pulls shards from an engine, computes device batches, and commits the votes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.memory import let_go_of
from models.rows import Rows
from service.engine.connection import (
    LEAVING_SECONDS,
    ConnectionState,
    EngineConnection,
    EngineUnreachable,
)
from service.engine.protocol import Engine
from service.worker.batch_metrics import about_batch, measure
from service.worker.batching import Slice
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.in_flight import InFlight, TaskBatch, leases_of, rows_of
from service.worker.model import DigestChanged, Model, ModelUnavailable
from service.worker.prefetch import Prefetcher
from service.worker.reporter import Reporter

T = TypeVar("T")

logger = logging.getLogger("vouchsafe.worker")


async def work(
    engine: Engine,
    models: Mapping[str, Model],
    *,
    worker_id: str,
    stop: asyncio.Event,
    thread: ComputeThread,
    lease_seconds: float = 30.0,
    connection_state: ConnectionState | None = None,
) -> None:
    """Serve `models` (by task; read again at every pull) until `stop`.

    - Beside a batch, the worker pulls the rows of one more.
    - Beside a slow batch, longer than a third of a lease, it pulls nothing and renews its leases.
    - On `stop` it finishes and commits the current batch, and releases the other leases. An
      unreachable engine may delay that by some seconds.
    - It retries after errors of the engine, and reports them to `connection_state`.

    Raises DeviceFailed where the device hangs, is broken, or ran out of memory. The worker then
    reports the current batch as failed and releases the other leases. Where the device hangs or is
    broken, the leases of the current batch expire instead.
    """
    connection = EngineConnection(connection_state)
    await _Loop(engine, models, worker_id, stop, thread, lease_seconds, connection).run()


class _Loop:
    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, Model],
        worker_id: str,
        stop: asyncio.Event,
        thread: ComputeThread,
        lease_seconds: float,
        connection: EngineConnection,
    ) -> None:
        self._engine = engine
        self._models = models
        self._stop = stop
        self._thread = thread
        self._slow_seconds = lease_seconds / 3
        self._connection = connection
        self._in_flight = InFlight()
        self._reporter = Reporter(engine, connection, lease_seconds)
        self._prefetcher = Prefetcher(
            engine, connection, models, worker_id, self._in_flight, self._reporter
        )
        self._slow_tasks: set[str] = set()  # whose last batch was slow

    async def run(self) -> None:
        leaving = asyncio.create_task(self._leave_on_stop())
        try:
            await self._run_until_leaving()
        finally:
            leaving.cancel()
            self._connection.leave()
            await self._reporter.finish(2 * LEAVING_SECONDS, self._prefetcher.pulling)
            await self._reporter.release_now(self._in_flight.leases)

    async def _leave_on_stop(self) -> None:
        await self._stop.wait()
        self._connection.leave()

    async def _run_until_leaving(self) -> None:
        """Repeat the step; back off after an error."""
        failures = 0
        while not self._connection.leaving.is_set():
            try:
                await self._step()
                failures = 0
                continue
            except DeviceFailed:
                raise
            except EngineUnreachable:
                pass
            except Exception:
                logger.exception("a step of the worker failed; retrying")
            await self._connection.pause(failures)
            failures += 1

    async def _step(self) -> None:
        """Compute one batch, and pull the rows of the next beside it; without rows, pull."""
        if self._prefetcher.has_ended:
            await self._prefetcher.finish()
        task = self._in_flight.next_task()
        if task is None:
            await self._prefetcher.pull()
            return
        if not task.is_served:
            self._release(task)
            return
        is_slow = self._is_slow(task)
        if is_slow:
            await self._prefetcher.finish()
        await self._renew(older_than=self._slow_seconds)
        while batch := task.packer.next_batch():
            if await self._start(task, batch):
                if not is_slow:
                    self._prefetcher.begin(self._slow_seconds)
                await self._compute(task, batch)
                return
            task.packer.put_back(batch)

    def _is_slow(self, task: TaskBatch) -> bool:
        """Whether the next batch loads networks, or the one before was slow."""
        return not task.model.is_loaded or task.task in self._slow_tasks

    def _release(self, task: TaskBatch) -> None:
        """Release the leases of a task that this worker does not serve now; others may serve it."""
        self._reporter.release(self._in_flight.remove(task))

    async def _start(self, task: TaskBatch, batch: Sequence[Slice]) -> bool:
        """Start the batch; False where lost leases were dropped, which makes room for others."""
        leases = leases_of(batch)
        try:
            held = await self._connection.ask(self._engine.start(leases))
        except BaseException:
            task.packer.put_back(batch)
            raise
        return self._in_flight.keep(leases, held)

    async def _compute(self, task: TaskBatch, batch: Sequence[Slice]) -> None:
        self._prefetcher.last_task = task.task
        began = time.monotonic()
        try:
            votes, result = await self._batch(task, batch)
            finished = task.packer.absorb(batch, votes)
        except DeviceFailed as error:
            self._drop(task, batch, error if self._thread.healthy else None)
            raise
        except DigestChanged:
            self._release(task)
        except ModelUnavailable as error:
            logger.error("task %s: %s", task.task, error, extra=about_batch(batch))
            self._drop(task, batch, error)
        except Exception as error:
            logger.exception("a batch of task %s failed", task.task, extra=about_batch(batch))
            let_go_of(error)
            await self._isolate(task, batch, error)
        else:
            counted_task = task.task if task.task in self._models else None
            measure(task.model, counted_task, batch, time.monotonic() - began)
            for lease, counts in finished:
                self._reporter.commit(lease, counts, result)
        finally:
            self._prefetcher.end()
            if time.monotonic() - began > self._slow_seconds:
                self._slow_tasks.add(task.task)
            else:
                self._slow_tasks.discard(task.task)

    async def _batch(
        self, task: TaskBatch, batch: Sequence[Slice]
    ) -> tuple[NDArray[np.int64], bytes]:
        """The votes (len(batch), K) of one device batch, and a demonstration's result."""
        parts, job = [rows_of(part) for part in batch], batch[0].lease.job
        if not job.demonstrates:
            return await self._votes(task, parts), b""
        call = partial(task.model.demonstrate, parts[0], job.epsilon, task.bundle)
        votes, result = await self._computed(call)
        return votes[None], result

    async def _votes(self, task: TaskBatch, parts: Sequence[Rows]) -> NDArray[np.int64]:
        """The votes (len(parts), K) of one device batch.

        Raises what the model raises, and ValueError for votes of another shape.
        """
        votes = await self._computed(partial(task.model.votes, parts, task.bundle))
        if votes.shape != (len(parts), task.model.classes):
            shape = (len(parts), task.model.classes)
            raise ValueError(f"votes of shape {votes.shape}, not {shape}")
        return votes

    async def _computed(self, call: Callable[[], T]) -> T:
        """The result of a call in the compute thread; renews the leases during a long call.

        Raises what the call raises, and DeviceFailed where it runs past its limit.
        """
        computing = asyncio.ensure_future(self._thread.run(call))
        try:
            while not computing.done():
                await asyncio.wait({computing}, timeout=self._slow_seconds)
                if not self._thread.healthy:
                    raise DeviceFailed("a device batch has run past its limit")
                if not computing.done():
                    await self._stay_alive()
        finally:
            computing.cancel()
        try:
            return computing.result()
        finally:
            del computing  # An error's frames hold the batch, and this one would hold the error.

    async def _stay_alive(self) -> None:
        """Renew all leases, and announce the worker, which may have none left."""
        try:
            await self._renew()
            await self._prefetcher.announce()
        except EngineUnreachable:
            return
        except Exception:
            logger.exception("the leases could not be renewed; retrying")

    async def _renew(self, older_than: float = 0.0) -> None:
        """Extend the leases that were renewed at least `older_than` seconds ago; drop lost ones."""
        if leases := self._in_flight.older_than(older_than):
            self._in_flight.keep(leases, await self._connection.ask(self._engine.renew(leases)))

    def _drop(self, task: TaskBatch, batch: Sequence[Slice], error: Exception | None) -> None:
        """Report the batch's leases as failed.

        Without an error, the batch may be what hangs or breaks the device. Its leases are then not
        reported and expire, which the engine counts as a worker crash.
        """
        for lease in leases_of(batch):
            task.packer.drop(lease)
            if error is not None:
                self._reporter.fail(lease, error)

    async def _isolate(self, task: TaskBatch, batch: Sequence[Slice], error: Exception) -> None:
        """Distinguish a broken device from a bad shard: retry each lease of a failed batch alone.

        Raises DeviceFailed where the device fails the self-test.
        """
        try:
            works = await self._device_works(task)
        except DeviceFailed as failure:
            if self._thread.healthy:
                self._drop(task, batch, failure)
            raise
        if not works:
            self._drop(task, batch, None)
            self._thread.declare_broken()
            raise DeviceFailed("the device fails a batch that it computed before") from error
        if len(leases_of(batch)) > 1:
            task.packer.put_back(batch, alone=True)
        else:
            self._drop(task, batch, error)

    async def _device_works(self, task: TaskBatch) -> bool:
        """Whether the self-test passes: a row that the networks computed as they were loaded."""
        try:
            await self._votes(task, [task.model.sample])
        except DeviceFailed:
            raise
        except (DigestChanged, ModelUnavailable):
            return True
        except Exception:
            logger.exception("the self-test failed")
            return False
        return True
