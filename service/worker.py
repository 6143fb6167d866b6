"""The worker: pulls shards from any engine, computes device batches, and commits the votes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.smoothing import Rows
from service import telemetry
from service.batching import Packer, Slice
from service.device import ComputeThread, DeviceFailed
from service.engine import FAILURES_ALLOWED, Engine, Lease, Worker
from service.errors import Problem, ShardDead, TaskUnusable
from service.outage import Outage
from service.reach import LEAVING_SECONDS, EngineAway, Reach

logger = logging.getLogger("vouchsafe.worker")


class ModelUnavailable(RuntimeError):
    """A task's networks cannot be had, whatever the rows; it says nothing of the device."""


class Model(Protocol):
    """A served task: networks that see one fixed shape, so that companions change nothing."""

    @property
    def batch_rows(self) -> int:
        """Most rows in a device batch."""

    def padding(self, rows: int) -> int:
        """Rows computed for nothing in a device batch of so many."""

    @property
    def classes(self) -> int:
        """K, the number of labels."""

    @property
    def digest(self) -> str:
        """The served digest: the bundle's, together with the numerics."""

    def votes(self, parts: Sequence[Rows]) -> NDArray[np.int64]:
        """Votes by class (len(parts), K) of one device batch; blocks.

        Raises ModelUnavailable where the networks cannot be loaded.
        """


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
    workers may be idle, and no more is taken until it ends. On `stop` the batch in hand is
    finished and committed and the rest handed back, for which an engine that does not answer has
    some seconds. Errors of the engine are waited out and told to `outage`; raises DeviceFailed
    where the device hangs or is broken, having handed back what it did not compute.
    """
    reach = Reach(outage)
    await _Loop(engine, models, worker_id, stop, thread, lease_seconds, reach).run()


@dataclass(slots=True, eq=False)
class _Lot:
    """What is in hand of one task and bundle."""

    task: str
    model: Model
    packer: Packer


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
        self._lots: dict[tuple[str, str], _Lot] = {}
        self._last_task: str | None = None
        self._extended: dict[str, float] = {}  # by token: when the lease began, or was renewed
        self._announced: dict[str, str] = {}  # by task: the digests that the engine knows of
        self._long: frozenset[str] = frozenset()  # the tokens of a batch that runs long
        self._tied: set[str] = set()  # tokens: to compute these anew elsewhere might never end
        self._proven: dict[str, Rows] = {}  # by digest: a blank image of a shape that works
        self._reports: set[asyncio.Task[None]] = set()
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
            last = {pulling, *self._reports}
            await asyncio.wait(last, timeout=2 * LEAVING_SECONDS)
            for late in last:
                late.cancel()
            await asyncio.wait(last, timeout=1)
            await self._hand_back()

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
        bundles = {task: model.digest for task, model in self._models.items()}
        most = max((model.batch_rows for model in self._models.values()), default=1)
        missing = most - sum(lot.packer.rows for lot in self._lots.values())
        if (
            self._long
        ):  # Whoever neither renews nor pulls is taken for dead, and its tasks for gone.
            missing = 0 if self._in_hand() and bundles == self._announced else 1
        if missing <= 0:
            await self._until_taken()
            return
        began = time.monotonic()
        pulling = self._engine.pull(Worker(self._worker_id, bundles), missing, self._last_task)
        leases = await self._reach.ask(pulling)
        self._announced = bundles
        for lease in leases:
            await self._accept(lease, began)
        if self._long:
            self._give_way()
            await self._until_taken()

    async def _until_taken(self) -> None:
        """Wait for room for more rows, or until a batch that runs long is looked at again."""
        self._taken.clear()
        await self._taken.wait()

    def _give_way(self) -> None:
        """Hand back all that can wait elsewhere while a batch runs long.

        Rows that were counted of a shard are computed anew; so one that needs several batches stays
        once it is begun, and so does one of a failed batch, to be tried alone.
        """
        stay = self._long | self._tied
        spare = [lease for lease in self._in_hand() if lease.token not in stay]
        for lease in spare:
            self._lots[lease.job.task, lease.job.bundle].packer.drop(lease)
            del self._extended[lease.token]
        if spare:
            self._report(self._release(spare))

    async def _accept(self, lease: Lease, began: float) -> None:
        model = self._models.get(lease.job.task)
        if model is None or model.digest != lease.job.bundle:
            await self._reach.ask(self._engine.release([lease]))  # It changed during the pull.
            return
        key = (lease.job.task, lease.job.bundle)
        lot = self._lots.setdefault(key, _Lot(lease.job.task, model, Packer(model.batch_rows)))
        lot.packer.add(lease)
        self._extended[lease.token] = began
        self._arrived.set()

    async def _compute_next(self) -> None:
        lot = self._next_lot()
        if lot is None:
            self._arrived.clear()
            await self._arrived.wait()
            return
        await self._renew(older_than=self._lease_seconds / 3)
        while batch := lot.packer.next_batch():
            self._taken.set()
            if await self._start(lot, batch):
                await self._compute(lot, batch)
                return
            lot.packer.put_back(batch)
        self._taken.set()

    def _next_lot(self) -> _Lot | None:
        """The lot whose turn it is: tasks in hand take turns, however fast one is topped up."""
        for key, lot in list(self._lots.items()):
            if not lot.packer.leases:
                del self._lots[key]
            elif lot.packer.rows:
                self._lots[key] = self._lots.pop(key)
                return lot
        return None

    async def _start(self, lot: _Lot, batch: Sequence[Slice]) -> bool:
        """Start the batch; False where some of it was lost, and let go of, so that more may fit."""
        leases, most = _leases(batch), lot.model.batch_rows
        self._tied |= {lease.token for lease in leases if lease.shard.rows > most}
        try:
            return self._keep(leases, await self._reach.ask(self._engine.start(leases)))
        except BaseException:
            lot.packer.put_back(batch)
            raise

    async def _compute(self, lot: _Lot, batch: Sequence[Slice]) -> None:
        self._last_task = lot.task
        began = time.monotonic()
        try:
            votes = await self._votes(lot.model, [_rows(part) for part in batch], batch)
            finished = lot.packer.absorb(batch, votes)
        except DeviceFailed:
            for lease in _leases(batch):
                lot.packer.drop(lease)  # Not handed back: they may be what hangs the device.
            raise
        except ModelUnavailable as error:
            logger.error("task %s: %s", lot.task, error)
            for lease in _leases(batch):
                lot.packer.drop(lease)
                self._report(self._fail(lease, TaskUnusable(str(error), job=lease.job.id)))
        except Exception as error:
            logger.exception("a batch of task %s failed", lot.task)
            await self._blame(lot, batch, error)
        else:
            self._measure(lot, batch, time.monotonic() - began)
            self._proven.setdefault(lot.model.digest, _blank(batch[0]))
            for lease, counts in finished:
                self._report(self._commit(lease, counts))

    def _measure(self, lot: _Lot, batch: Sequence[Slice], seconds: float) -> None:
        rows = sum(part.rows for part in batch)
        if lot.task in self._models:  # The series of a task that is gone would never go again.
            telemetry.ROWS.labels(task=lot.task).inc(rows)
            telemetry.BATCHES.labels(task=lot.task).inc()
        telemetry.BATCH_ROWS.observe(rows)
        telemetry.PADDING_ROWS.inc(lot.model.padding(rows))
        telemetry.BATCH_SECONDS.observe(seconds)
        telemetry.BATCH_JOBS.observe(len({part.lease.job.id for part in batch}))

    async def _votes(
        self, model: Model, parts: Sequence[Rows], batch: Sequence[Slice]
    ) -> NDArray[np.int64]:
        """One device batch, renewing the leases meanwhile; raises what the model raises.

        It runs long after a third of a lease (10 s by default). Time alone decides, for nobody here
        knows who else is idle; where nobody is, what went back comes again after the batch.
        """
        computing = asyncio.ensure_future(self._thread.run(model.votes, parts))
        try:
            while not computing.done():
                await asyncio.wait({computing}, timeout=self._lease_seconds / 3)
                if not self._thread.healthy:
                    raise DeviceFailed("a device batch has run past its limit")
                if not computing.done():
                    self._long = frozenset(lease.token for lease in _leases(batch))
                    self._give_way()
                    await self._renew_if_possible()
                    self._taken.set()
        finally:
            self._long = frozenset()
            self._taken.set()
            computing.cancel()
        votes = computing.result()
        if votes.shape != (len(parts), model.classes):
            raise ValueError(f"votes of shape {votes.shape}")
        return votes

    async def _blame(self, lot: _Lot, batch: Sequence[Slice], error: Exception) -> None:
        """Tell a broken device from a bad shard: each lease of a failed batch is tried alone."""
        if not await self._device_works(lot.model, batch):
            self._thread.declare_broken()
            raise DeviceFailed("the device fails a batch that it computed before") from error
        suspects = _leases(batch)
        if len(suspects) > 1:
            lot.packer.put_back(batch, alone=True)
            self._tied |= {lease.token for lease in suspects}
        else:
            lot.packer.drop(suspects[0])
            self._report(self._fail(suspects[0], _dead(suspects[0], error)))

    async def _device_works(self, model: Model, batch: Sequence[Slice]) -> bool:
        """The self-test: a blank image once more, where one has been computed before."""
        proven = self._proven.get(model.digest)
        try:
            if proven is not None:
                await self._votes(model, [proven], batch)
        except DeviceFailed:
            raise
        except ModelUnavailable:
            return True
        except Exception:
            logger.exception("the self-test failed")
            return False
        return True

    async def _renew(self, older_than: float = 0.0) -> None:
        """Extend the leases in hand that are so many seconds old and let go of those lost."""
        since = time.monotonic() - older_than
        leases = [held for held in self._in_hand() if self._extended[held.token] <= since]
        if leases:
            self._keep(leases, await self._reach.ask(self._engine.renew(leases)))

    def _keep(self, leases: Sequence[Lease], held: Sequence[Lease]) -> bool:
        """Of these leases let go of all but those held; True where that is none."""
        now, tokens = time.monotonic(), {lease.token for lease in held}
        for lease in leases:
            if lease.token in tokens:
                self._extended[lease.token] = now
            else:
                self._lots[lease.job.task, lease.job.bundle].packer.drop(lease)
        self._extended = {lease.token: self._extended[lease.token] for lease in self._in_hand()}
        self._tied &= self._extended.keys()
        self._taken.set()
        return len(tokens) == len(leases)

    async def _renew_if_possible(self) -> None:
        try:
            await self._renew()
        except EngineAway:
            return
        except Exception:
            logger.exception("the leases could not be renewed")

    def _in_hand(self) -> list[Lease]:
        return [lease for lot in self._lots.values() for lease in lot.packer.leases]

    async def _commit(self, lease: Lease, counts: NDArray[np.int64]) -> None:
        try:
            counted = await self._reach.insist(
                lambda: self._engine.commit(lease, counts.tolist()), self._lease_seconds
            )
        except ValueError as error:
            await self._fail(lease, _dead(lease, error))
        else:
            telemetry.SHARDS.labels(outcome="committed" if counted else "refused").inc()

    async def _fail(self, lease: Lease, problem: Problem) -> None:
        await self._reach.insist(
            lambda: self._engine.fail(lease, problem.document()), self._lease_seconds
        )
        telemetry.SHARDS.labels(outcome="failed").inc()

    def _report(self, report: Coroutine[Any, Any, None]) -> None:
        """Tell the engine while the next batch computes."""
        task = asyncio.create_task(_logged(report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _hand_back(self) -> None:
        if leases := self._in_hand():
            await self._release(leases)

    async def _release(self, leases: Sequence[Lease]) -> None:
        try:
            await self._reach.insist(lambda: self._engine.release(leases), self._lease_seconds)
        except EngineAway:
            logger.warning("%d shards go back only when their leases run out", len(leases))
        except Exception:
            logger.exception("%d shards could not be handed back", len(leases))
        else:
            telemetry.SHARDS.labels(outcome="released").inc(len(leases))


def _dead(lease: Lease, error: Exception) -> ShardDead:
    detail = f"The same rows failed {FAILURES_ALLOWED} times: {type(error).__name__}."
    return ShardDead(detail, job=lease.job.id)


def _leases(batch: Sequence[Slice]) -> list[Lease]:
    return list({part.lease.token: part.lease for part in batch}.values())


def _rows(part: Slice) -> Rows:
    job = part.lease.job
    return Rows(
        pixels=np.frombuffer(job.pixels, np.uint8).reshape(job.shape),
        key=job.domain_key(part.lease.shard.domain),
        start=part.start,
        stop=part.stop,
        sigma=job.sigma,
    )


def _blank(part: Slice) -> Rows:
    job = part.lease.job
    return Rows(np.zeros(job.shape, np.uint8), bytes(32), 0, 1, job.sigma)


async def _logged(report: Coroutine[Any, Any, None]) -> None:
    try:
        await report
    except EngineAway:
        telemetry.SHARDS.labels(outcome="lost").inc()
    except Exception:
        logger.exception("the outcome of a shard could not be reported")
