"""A question's way through the service: checked, admitted, decoded, queued, awaited."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.certificates import (
    check_certify,
    check_predict,
    smallest_n_certify,
    smallest_n_predict,
)
from service.config import Settings
from service.engine.connection import UNREACHABLE
from service.engine.protocol import RETRY_SECONDS, Engine
from service.errors import (
    Backlog,
    JobCancelled,
    JobFailed,
    JobLost,
    NotFound,
    Problem,
    TaskNotReady,
    as_json,
)
from service.jobs import Job, JobStatus, Mode, State, noise_key
from service.operations import metrics
from service.operations.logs import about
from service.predictions.admission import Admission, AdmissionControl
from service.predictions.images.reader import ImageLimits, ImageReader
from service.predictions.results import answer, job_response, problem, total_variation
from service.predictions.schemas import JobResponse, PredictRequest, PredictResponse
from service.validation import invalid_field

T = TypeVar("T")

logger = logging.getLogger("vouchsafe")

_AWAY_SECONDS = 1.0


class Predictions:
    """Turns questions into jobs and jobs into answers; knows nothing of HTTP.

    `expect` is called with a task that is not in `tasks`: it returns the id under which it may be
    there, or raises the reason why it is not.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        tasks: Mapping[str, Bundle],
        secret: bytes,
        expect: Callable[[str], Coroutine[Any, Any, str]] | None = None,
    ) -> None:
        self.engine = engine
        self.tasks = tasks
        self._settings = settings
        self._secret = secret
        self._expect = expect
        self._reader = ImageReader(
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.decode_seconds,
            settings.decode_threads,
        )
        self._watched: dict[str, tuple[Job, asyncio.Task[JobStatus]]] = {}
        self._admission = AdmissionControl(settings, engine)
        self._draining = asyncio.Event()
        self._forgetting: set[asyncio.Task[bool]] = set()

    async def submit(
        self,
        asked: PredictRequest,
        owner: str | None,
        idempotency_key: str | None,
        traceparent: str | None = None,
    ) -> str:
        """Queue the question and return its job's id, or that of the job the key made before.

        A new job keeps the trace context that it came with, and nothing of it depends on that.
        Raises InvalidField for what the task cannot answer, QuotaExceeded, Backlog,
        IdempotencyMismatch, and what `resolved` and `images.decode` raise.
        """
        asked = await self.resolved(asked)
        bundle = self.bundle(asked.task)
        _check(asked, bundle)
        known = idempotency_key is not None
        admission = await self._admission.admit(asked, bundle, owner, may_be_known=known)
        pixels = await self._reader.read(asked.image, bundle.resolution)
        job = self._job(asked, pixels, bundle, admission, owner, traceparent)
        job_id = await self.engine.submit(
            job, idempotency_key=idempotency_key, fingerprint=asked.fingerprint() if known else ""
        )
        if job_id == job.id:
            self._watch(job)
            self._admission.prepared(job.sigma)
            if (
                self.tasks.get(asked.task) is not bundle
            ):  # `cancel_stale` came before it was watched.
                await self._forget(job_id)  # A key would repeat what its caller did not end.
                detail = f"The task {as_json(asked.task)} changed as it was asked; ask again"
                raise TaskNotReady(detail, retry_after=1, task=asked.task)
        return job_id

    async def resolved(self, asked: PredictRequest) -> PredictRequest:
        """The question with the id of its task, be it asked by name.

        Raises NotFound for an unknown task, TaskAmbiguous for a name that several tasks have,
        TaskNotReady and TaskFailed.
        """
        if asked.task not in self.tasks and self._expect is not None:
            asked = asked.model_copy(update={"task": await self._expect(asked.task)})
        self.bundle(asked.task)
        return asked

    def bundle(self, task: str) -> Bundle:
        """The task's bundle; raises NotFound with the tasks that there are."""
        if task not in self.tasks:
            known = sorted(self.tasks)
            raise NotFound(
                f"There is no task {as_json(task)}; there are {', '.join(known)}", tasks=known
            )
        return self.tasks[task]

    async def status(self, job_id: str, owner: str | None) -> JobStatus:
        """The job's status; raises NotFound where there is none or another caller's key made it."""
        status = await self.engine.status(job_id)
        if status is None or status.job.owner != owner:
            raise NotFound("There is no such job, or no longer")
        return status

    async def ended(
        self,
        job_id: str,
        seconds: float,
        leaving: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> JobStatus | None:
        """The job's last status, or None where it has not ended within `seconds`.

        Where `leaving` returns first, the caller is gone: the job is cancelled, and JobCancelled
        raised. Raises NotFound for a job that is unknown, JobLost for one that the engine has lost
        since, and Backlog once `drain` has been called and its grace is over.
        """
        if not seconds:
            return None
        ending = self._ending(job_id)
        gone = asyncio.create_task(leaving()) if leaving is not None else None
        draining = asyncio.create_task(self._draining.wait())
        tasks: set[asyncio.Future[Any]] = {task for task in (ending, gone, draining) if task}
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done() and gone is not None and gone.done():
                await self.engine.cancel(job_id)
                raise JobCancelled("The caller left before the answer was ready", job=job_id)
            if not ending.done() and draining.done():
                detail = "This process is stopping; ask again"
                if self._settings.redis_url is not None:
                    detail = f"This process is stopping; the job goes on: ask for /jobs/{job_id}"
                raise Backlog(detail, retry_after=RETRY_SECONDS, job=job_id)
            return ending.result() if ending.done() else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def told(self, status: JobStatus) -> JobResponse:
        """The job as it stands; raises NotFound for an answer of a bundle that is gone."""
        succeeded = status.state is State.SUCCEEDED
        return job_response(status, self._bundle_of(status.job).labels if succeeded else None)

    async def cancel_stale(self, task: str) -> None:
        """Cancel the jobs of a task that is served no more, or not as it was when they were asked.

        May be repeated where the engine was out of reach.
        """
        bundle = self.tasks.get(task)
        digest = None if bundle is None else bundle.digest
        for job, _ in list(self._watched.values()):
            if job.task == task and job.task_digest != digest:
                await self.engine.cancel(job.id)
        self._admission.delete(task)
        if task not in self.tasks:
            metrics.delete(task)

    def answer(self, status: JobStatus) -> PredictResponse:
        """What an ended job answers.

        Raises JobFailed with its problem where there is no answer, and NotFound for an answer of a
        bundle that is gone.
        """
        if (refusal := problem(status)) is not None:
            raise JobFailed(refusal)
        return answer(status, self._bundle_of(status.job).labels)

    def drain(self, grace_seconds: float) -> None:
        """Let waiting callers go: whoever has no answer after the grace is told to ask again."""
        asyncio.get_running_loop().call_later(grace_seconds, self._draining.set)

    async def close(self) -> None:
        """Drop the image threads and stop watching jobs, and forgetting what is not yet."""
        self._reader.close()
        watching = [watching for _, watching in self._watched.values()]
        tasks: list[asyncio.Task[Any]] = [*watching, *self._forgetting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _job(
        self,
        asked: PredictRequest,
        pixels: NDArray[np.uint8],
        bundle: Bundle,
        admission: Admission,
        owner: str | None,
        traceparent: str | None,
    ) -> Job:
        channels, height, width = pixels.shape
        job = Job(
            id=secrets.token_urlsafe(16),
            task=asked.task,
            task_digest=bundle.digest,
            bundle=admission.digest,
            mode=asked.mode,
            sigma=asked.sigma,
            alpha=asked.alpha,
            n0=asked.selection_rows,
            n=asked.n,
            classes=len(bundle.labels),
            shape=(channels, height, width),
            pixels=pixels.tobytes(),
            key=b"",
            created=time.time(),
            owner=owner,
            traceparent=traceparent,
            setup_rows=admission.setup_rows,
        )
        return replace(job, key=noise_key(self._secret, job))

    def _bundle_of(self, job: Job) -> Bundle:
        """The very bundle that the job was asked of; raises NotFound where it is another now."""
        bundle = self.tasks.get(job.task)
        if bundle is None or bundle.digest != job.task_digest:
            raise NotFound(
                f"The task {as_json(job.task)} that this job was asked of is gone, or another by "
                "now; ask again, with a new Idempotency-Key if you send one",
                job=job.id,
            )
        return bundle

    async def _last_status(self, job_id: str) -> JobStatus:
        last = None
        async for status in self.engine.watch(job_id):
            last = status
        if last is None:
            raise NotFound("There is no such job, or no longer")
        if not last.state.ended:
            raise job_lost(job_id)
        return last

    def _watch(self, job: Job) -> None:
        """Wait for the job's end once for everyone here, and count its outcome."""
        watching = asyncio.create_task(_answered(partial(self._last_status, job.id)))
        self._watched[job.id] = replace(job, pixels=b""), watching
        watching.add_done_callback(partial(self._count_outcome, job.id))

    async def _forget(self, job_id: str) -> None:
        """Have the engine forget the job: now, or while nobody waits once it is in reach again."""
        forgetting = asyncio.create_task(_answered(partial(self.engine.delete, job_id)))
        self._forgetting.add(forgetting)
        forgetting.add_done_callback(self._forgetting.discard)
        await asyncio.wait({forgetting}, timeout=_AWAY_SECONDS)

    def _ending(self, job_id: str) -> asyncio.Future[JobStatus]:
        """The job's last status, once there is one."""
        if job_id in self._watched:
            return asyncio.shield(self._watched[job_id][-1])
        return asyncio.create_task(self._last_status(job_id))

    def _count_outcome(self, job_id: str, watching: asyncio.Task[JobStatus]) -> None:
        del self._watched[job_id]
        if watching.cancelled() or watching.exception() is not None:
            return
        status = watching.result()
        try:
            told = self.answer(status)
        except Problem as error:  # There is no answer to count.
            if status.state is State.FAILED:
                logger.warning("a job failed: %s", error, extra=about([status.job]))
            return
        metrics.QUEUE_SECONDS.observe(told.timing_ms.queue / 1000)
        outcome = "abstained" if told.abstained else "answered"
        metrics.PREDICTIONS.labels(told.task, told.mode.value, outcome).inc()
        if not told.abstained and told.radius is not None:
            metrics.CERTIFIED_RADIUS.observe(told.radius)


def job_lost(job_id: str) -> JobLost:
    """The problem of a job that was accepted and is not there any more."""
    detail = "The queue was lost, and the job with it; ask again"
    return JobLost(detail, retry_after=1, job=job_id)


async def _answered(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What the engine answers, however long it is out of reach meanwhile."""
    while True:
        try:
            return await call()
        except UNREACHABLE:
            await asyncio.sleep(_AWAY_SECONDS)


def _check(asked: PredictRequest, bundle: Bundle) -> None:
    """Raises InvalidField for noise too strong for the task and for what could only abstain."""
    if asked.sigma > bundle.largest_sigma:
        limit = bundle.largest_sigma
        detail = (
            f"sigma = {asked.sigma:g}: the task {as_json(asked.task)} supports at most {limit:g}"
        )
        raise invalid_field("sigma", detail, asked.sigma, limit)
    certifying = asked.mode is Mode.CERTIFY
    smallest_n = smallest_n_certify if certifying else smallest_n_predict
    try:
        if certifying:
            check_certify(asked.n0, asked.n, asked.sigma, asked.alpha)
        else:
            shape = (3, bundle.resolution, bundle.resolution)
            check_predict(asked.n, asked.alpha, total_variation(shape, asked.sigma))
    except ValueError as error:
        field = str(error).partition(" ")[0]
        least = smallest_n(asked.alpha) if field == "n" else None
        raise invalid_field(field, str(error), getattr(asked, field), least) from error
