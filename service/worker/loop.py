"""The worker: pulls shards from any engine, computes device batches, and commits the votes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.memory import let_go_of
from models.rows import Rows
from service.engine.connection import LEAVING_SECONDS, EngineAway, Outage, Reach
from service.engine.limits import distinct
from service.engine.protocol import Engine, Lease, Worker
from service.worker.batch_metrics import about_batch, measure
from service.worker.batching import Slice
from service.worker.compute import ComputeThread, DeviceFailed
from service.worker.in_flight import Holdings, Lot, leases_of, rows_of
from service.worker.model import Model, ModelUnavailable, ShapeLowered
from service.worker.reporter import Outcomes

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
    outage: Outage | None = None,
) -> None:
    """Serve `models` (by task; read anew at every pull) until `stop`.

    One batch is computed while the rows of one more are held. A batch that has run for a third of
    a lease, as where its networks are loading, is all that is held: the rest goes back, for other
    workers may be idle, unless it is begun, and no more is taken until it ends. On `stop` the batch
    in hand is finished and committed and the rest handed back, for which an engine that does not
    answer has some seconds. What is held of a task whose shape was lowered goes
    back too, and the task is announced under its new digest from then on; one that is refused,
    once it has been loaded.
    Errors of the engine are waited out and told to `outage`; raises DeviceFailed where the device
    hangs, is broken, or has too little memory, having handed back all but the batch over which it
    ends: that has failed, or where the device hangs, or breaks as it computes, its leases run out.
    """
    reach = Reach(outage)
    await _Loop(engine, models, worker_id, stop, thread, lease_seconds, reach).run()


class _Loop:
    def __init__(
        self,
        engine: Engine,
        models: Mapping[str, Model],
        worker_id: str,
        stop: asyncio.Event,
        thread: ComputeThread,
        lease_seconds: float,
        reach: Reach,
    ) -> None:
        self._engine = engine
        self._models = models
        self._worker_id = worker_id
        self._stop = stop
        self._thread = thread
        self._lease_seconds = lease_seconds
        self._reach = reach
        self._holdings = Holdings()
        self._outcomes = Outcomes(engine, self._reach, lease_seconds)
        self._last_task: str | None = None
        self._announced: dict[str, str] = {}  # by task: the digests that the engine knows of
        self._long: frozenset[str] | None = None  # the tokens of a batch that runs long
        self._has_tried = False  # a refused task, since a lot was computed
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    async def run(self) -> None:
        listening = asyncio.create_task(self._end_on_stop())
        pulling = asyncio.create_task(self._until_ending(self._prefetch))
        try:
            await self._until_ending(self._compute_next)
        finally:
            listening.cancel()
            self._end()
            await self._outcomes.told(2 * LEAVING_SECONDS, pulling)
            if leases := self._holdings.leases:
                await self._outcomes.release(leases)

    async def _end_on_stop(self) -> None:
        await self._stop.wait()
        self._end()

    def _end(self) -> None:
        self._reach.leave()
        self._arrived.set()
        self._taken.set()

    async def _until_ending(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat the step; after an error of the engine a pause is made before the next."""
        failures = 0
        while not self._reach.leaving.is_set():
            try:
                await step()
                failures = 0
                continue
            except DeviceFailed:
                raise
            except EngineAway:
                pass
            except Exception:
                logger.exception("a step of the worker failed; trying again")
            await self._reach.pause(failures)
            failures += 1

    async def _prefetch(self) -> None:
        """Hold the rows of one batch besides the one being computed, none while that runs long."""
        models = dict(self._models)
        bundles = {task: model.digest for task, model in models.items() if not model.is_refused}
        if any(model.is_due for model in models.values()):
            self._arrived.set()
        most = max((model.batch_rows for model in models.values()), default=1)
        missing = most - self._holdings.rows
        if self._long is not None:
            # Whoever neither renews nor pulls is taken for dead, and its tasks for gone.
            missing = 0 if self._holdings.leases and bundles == self._announced else 1
        if missing <= 0:
            await self._until_taken()
            return
        began = time.monotonic()
        numerics = distinct(model.numerics.described() for model in models.values())
        announced = Worker(self._worker_id, bundles, numerics)
        pulling = self._engine.pull(announced, missing, self._last_task)
        leases = await self._reach.ask(pulling)
        self._announced = bundles
        for lease in leases:
            await self._accept(lease, began)
        if self._long is not None:
            self._give_way(self._long)
            await self._until_taken()

    async def _until_taken(self) -> None:
        """Wait for room for more rows, or until a batch that runs long is looked at again."""
        self._taken.clear()
        await self._taken.wait()

    def _give_way(self, long: frozenset[str]) -> None:
        """Hand back all that can wait elsewhere while a batch of these tokens runs long."""
        self._outcomes.released(self._holdings.give_away(long))

    def _give_up(self, lot: Lot) -> None:
        """Hand back what is not served here, for now or any more: others may, or it restarts."""
        self._outcomes.released(self._holdings.give_up(lot))
        self._taken.set()

    async def _accept(self, lease: Lease, began: float) -> None:
        model = self._models.get(lease.job.task)
        if model is None or model.digest != lease.job.bundle:
            await self._reach.ask(self._engine.release([lease]))  # It changed during the pull.
            return
        if lease.job.classes != model.classes:  # No worker of the digest can compute it.
            what = f"a job of {lease.job.classes} classes for a task of {model.classes}"
            self._outcomes.failed(lease, ValueError(what))
            return
        self._holdings.add(lease, model, began)
        self._arrived.set()

    async def _compute_next(self) -> None:
        due = next((model for model in self._models.values() if model.is_due), None)
        rather = self._has_tried or self._holdings.are_tied
        if due is not None and not (self._holdings.rows and rather):
            self._has_tried = True
            await self._try_again(due)
            return
        self._has_tried = False
        lot = self._holdings.next_lot()
        if lot is None:
            self._arrived.clear()
            await self._arrived.wait()
            return
        if not lot.is_served:
            self._give_up(lot)
            return
        await self._renew(older_than=self._lease_seconds / 3)
        while batch := lot.packer.next_batch():
            self._taken.set()
            if await self._start(lot, batch):
                await self._compute(lot, batch)
                return
            lot.packer.put_back(batch)
        self._taken.set()

    async def _start(self, lot: Lot, batch: Sequence[Slice]) -> bool:
        """Start the batch; False where some of it was lost, and let go of, so that more may fit."""
        leases, most = leases_of(batch), lot.model.batch_rows
        self._holdings.tie(lease for lease in leases if lease.shard.rows > most)
        try:
            return self._keep(leases, await self._reach.ask(self._engine.start(leases)))
        except BaseException:
            lot.packer.put_back(batch)
            raise

    async def _compute(self, lot: Lot, batch: Sequence[Slice]) -> None:
        self._last_task = lot.task
        began = time.monotonic()
        try:
            votes = await self._votes(lot, [rows_of(part) for part in batch], batch)
            finished = lot.packer.absorb(batch, votes)
        except DeviceFailed as error:
            self._drop(lot, batch, error if self._thread.healthy else None)
            raise
        except ShapeLowered:
            self._give_up(lot)
        except ModelUnavailable as error:
            logger.error("task %s: %s", lot.task, error, extra=about_batch(batch))
            self._drop(lot, batch, error)
        except Exception as error:
            logger.exception("a batch of task %s failed", lot.task, extra=about_batch(batch))
            let_go_of(error)
            await self._blame(lot, batch, error)
        else:
            task = lot.task if lot.task in self._models else None
            measure(lot.model, task, batch, time.monotonic() - began)
            for lease, counts in finished:
                self._outcomes.committed(lease, counts)

    def _drop(self, lot: Lot, batch: Sequence[Slice], error: Exception | None) -> None:
        """Report the batch's leases as failed; without an error they may be what hangs or breaks
        the device, and nobody is told: they run out, which counts as a death over them."""
        for lease in leases_of(batch):
            lot.packer.drop(lease)
            if error is not None:
                self._outcomes.failed(lease, error)

    async def _try_again(self, refused: Model) -> None:
        """Load what others serve meanwhile, or fail together: no job of it is at stake here, and a
        worker that is to leave leaves it to load for nobody."""
        trying = asyncio.ensure_future(self._computed(refused.try_again))
        leaving = asyncio.ensure_future(self._reach.leaving.wait())
        try:
            await asyncio.wait({trying, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if trying.done():
                trying.result()
        except ModelUnavailable as error:
            logger.warning("tried again in vain: %s", error)
        finally:
            trying.cancel()
            leaving.cancel()
            del trying  # An error's frames hold what was loaded, and this one would hold the error.

    async def _votes(
        self, lot: Lot, parts: Sequence[Rows], batch: Sequence[Slice]
    ) -> NDArray[np.int64]:
        """One device batch; raises what the model raises."""
        call = partial(lot.model.votes, parts, lot.bundle)
        votes = await self._computed(call, leases_of(batch))
        if votes.shape != (len(parts), lot.model.classes):
            raise ValueError(f"votes of shape {votes.shape}")
        return votes

    async def _computed(self, call: Callable[[], T], leases: Sequence[Lease] = ()) -> T:
        """What the device computes of these leases, renewing all that are held meanwhile.

        It runs long after a third of a lease (10 s by default). Time alone decides, for nobody here
        knows who else is idle; where nobody is, what went back comes again after the batch.
        """
        computing = asyncio.ensure_future(self._thread.run(call))
        try:
            while not computing.done():
                await asyncio.wait({computing}, timeout=self._lease_seconds / 3)
                if not self._thread.healthy:
                    raise DeviceFailed("a device batch has run past its limit")
                if not computing.done():
                    self._long = frozenset(lease.token for lease in leases)
                    self._give_way(self._long)
                    await self._renew_if_possible()
                    self._taken.set()
        finally:
            self._long = None
            self._taken.set()
            computing.cancel()
        try:
            return computing.result()
        finally:
            del computing  # An error's frames hold the batch, and this one would hold the error.

    async def _blame(self, lot: Lot, batch: Sequence[Slice], error: Exception) -> None:
        """Tell a broken device from a bad shard: each lease of a failed batch is tried alone."""
        try:
            works = await self._device_works(lot, batch)
        except ShapeLowered:
            self._give_up(lot)
            return
        except DeviceFailed as failure:
            if self._thread.healthy:
                self._drop(lot, batch, failure)
            raise
        if not works:
            self._drop(lot, batch, None)
            self._thread.declare_broken()
            raise DeviceFailed("the device fails a batch that it computed before") from error
        suspects = leases_of(batch)
        if len(suspects) > 1:
            lot.packer.put_back(batch, alone=True)
            self._holdings.tie(suspects)
        else:
            self._drop(lot, batch, error)

    async def _device_works(self, lot: Lot, batch: Sequence[Slice]) -> bool:
        """The self-test: once more what the networks computed as they were loaded."""
        try:
            await self._votes(lot, [lot.model.sample], batch)
        except (DeviceFailed, ShapeLowered):
            raise
        except ModelUnavailable:
            return True
        except Exception:
            logger.exception("the self-test failed")
            return False
        return True

    async def _renew(self, older_than: float = 0.0) -> None:
        """Extend the leases in hand that are so many seconds old and let go of those lost."""
        if leases := self._holdings.aged(older_than):
            self._keep(leases, await self._reach.ask(self._engine.renew(leases)))

    async def _renew_if_possible(self) -> None:
        try:
            await self._renew()
        except EngineAway:
            return
        except Exception:
            logger.exception("the leases could not be renewed")

    def _keep(self, leases: Sequence[Lease], held: Sequence[Lease]) -> bool:
        """Let go of those of these leases that are held no more; True where that is none."""
        kept = self._holdings.keep(leases, held)
        self._taken.set()
        return kept
