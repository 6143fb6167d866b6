"""Predictions without HTTP: questions are checked, admitted, decoded, queued and awaited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from models.bundle import Bundle
from service.config import Settings
from service.engine.protocol import Engine
from service.errors import (
    JobFailed,
    NotFound,
    Problem,
    TaskNotReady,
    as_json,
)
from service.jobs import Job, JobStatus, State
from service.operations import metrics
from service.operations.logs import about
from service.predictions.admission import AdmissionControl
from service.predictions.certificate import Issuing
from service.predictions.checks import check_question
from service.predictions.demonstrations import (
    Asked,
    DemonstrationResponse,
    demonstration_response,
)
from service.predictions.document import SignedCertificate
from service.predictions.images.reader import ImageLimits, ImageReader
from service.predictions.jobs import to_job
from service.predictions.question import ImageRequest
from service.predictions.results import job_response, label_counts, problem, to_response
from service.predictions.rounds import finish_early, keep_looking, proven
from service.predictions.schemas import JobResponse, PredictResponse
from service.predictions.waiting import JobWaiter
from service.signing import SigningKeys

logger = logging.getLogger("vouchsafe")

Request = TypeVar("Request", bound=ImageRequest)


class Predictions:
    """Turns questions into jobs, and jobs into answers.

    `expect` is called with a task that is not in `tasks`. It returns an id to look up there, or
    raises the problem that keeps the task out. `draining` is set once the grace of `drain` is over.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        tasks: Mapping[str, Bundle],
        secret: bytes,
        keys: SigningKeys,
        expect: Callable[[str], Coroutine[Any, Any, str]] | None = None,
    ) -> None:
        self.engine = engine
        self.tasks = tasks
        self._settings = settings
        self._secret = secret
        self._issuing = Issuing(secret, keys)
        self._expect = expect
        self._reader = ImageReader(
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.decode_seconds,
            settings.decode_threads,
        )
        self._admission = AdmissionControl(settings, engine)
        is_shared = settings.redis_url is not None
        self._waiter = JobWaiter(engine, self._count_outcome, is_shared=is_shared)
        self.draining = self._waiter.draining

    async def submit(
        self,
        question: Asked,
        owner: str | None,
        idempotency_key: str | None,
        traceparent: str | None = None,
    ) -> str:
        """Queue the question; returns its job's id, or the id of the `idempotency_key`'s job.

        A new job carries the `traceparent`; nothing depends on it. Raises InvalidField for a
        question that the task cannot answer, QuotaExceeded, Backlog, IdempotencyMismatch, and
        all that `resolved` and `images.decode` raise.
        """
        question = await self.resolved(question)
        bundle = self.bundle(question.task)
        check_question(question, bundle)
        known = idempotency_key is not None
        admission = await self._admission.admit(question, bundle, owner, may_be_known=known)
        pixels = await self._reader.read(question.image, bundle.resolution)
        job = to_job(question, pixels, bundle, admission, self._secret, owner, traceparent)
        job_id = await self.engine.submit(
            job,
            idempotency_key=idempotency_key,
            fingerprint=question.fingerprint() if known else "",
        )
        if job_id == job.id:
            self._waiter.watch(job)
            self._admission.prepared(job.sigmas)
            if self.tasks.get(question.task) is not bundle:
                # `cancel_stale` ran before the job was watched. The job is deleted, since a retry
                # with its Idempotency-Key would find it.
                await self._waiter.delete(job_id)
                detail = (
                    f"The task {as_json(question.task)} changed meanwhile; send the request again"
                )
                raise TaskNotReady(detail, retry_after=1, task=question.task)
        return job_id

    async def resolved(self, question: Request) -> Request:
        """The question with its task's id in the place of a name; raises as `task_id`."""
        task = await self.task_id(question.task)
        return question if task == question.task else question.model_copy(update={"task": task})

    async def task_id(self, task: str) -> str:
        """The id of a task that has this id or name.

        Raises NotFound for an unknown task, TaskAmbiguous for a name of several tasks,
        TaskNotReady and TaskFailed.
        """
        if task not in self.tasks and self._expect is not None:
            task = await self._expect(task)
        self.bundle(task)
        return task

    def bundle(self, task: str) -> Bundle:
        """The task's bundle; raises NotFound, which lists the tasks."""
        if task not in self.tasks:
            known = sorted(self.tasks)
            raise NotFound(
                f"There is no task {as_json(task)}; there are {', '.join(known)}", tasks=known
            )
        return self.tasks[task]

    async def status(
        self, job_id: str, owner: str | None, *, demonstrates: bool = False
    ) -> JobStatus:
        """The status of a question's job, or of a demonstration's.

        Raises NotFound for an unknown job, for another owner's, and for a job of the other kind.
        """
        status = await self.engine.status(job_id)
        if (
            status is None
            or status.job.owner != owner
            or status.job.demonstrates is not demonstrates
        ):
            noun = "demonstration" if demonstrates else "job"
            raise NotFound(f"There is no such {noun}, or no longer")
        return status

    async def ended(
        self,
        job_id: str,
        seconds: float,
        leaving: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> JobStatus | None:
        """The job's last status, or None for a job that has not ended within `seconds`.

        `leaving` returns when the caller disconnects: the job is cancelled, and JobCancelled
        raised. Raises NotFound for an unknown job, JobLost for a job that the engine has lost, and
        Backlog once the grace of `drain` is over.
        """
        return await self._waiter.ended(job_id, seconds, leaving)

    async def finished_early(self, job_id: str) -> JobStatus | None:
        """The last status of a job that ends by its caller's deadline, or None; `finish_early`."""
        return await finish_early(self.engine, job_id)

    async def keep_looking(self, stop: asyncio.Event) -> None:
        """Background task: goes on with early-stopping jobs whose look is due, until `stop`."""
        await keep_looking(self.engine, stop)

    async def to_job_response(self, status: JobStatus) -> JobResponse:
        """The job's response; raises NotFound for a result whose bundle is gone."""
        succeeded = status.state is State.SUCCEEDED
        return job_response(status, await self.to_response(status) if succeeded else None)

    def to_demonstration(self, status: JobStatus) -> DemonstrationResponse:
        """A demonstration's response; raises NotFound for pictures whose bundle is gone."""
        succeeded = status.state is State.SUCCEEDED
        labels = self._bundle_of(status.job).labels if succeeded else ()
        return demonstration_response(status, labels)

    def proven_so_far(self, status: JobStatus) -> dict[str, Any] | None:
        """The bound and the votes of an early-stopping job's last whole look; None before one.

        Raises NotFound once the job's bundle is gone.
        """
        if (bound := proven(status)) is None:
            return None
        counts = label_counts(status.looks[-1], self._bundle_of(status.job).labels)
        return {**bound._asdict(), "counts": [count.model_dump() for count in counts]}

    async def cancel_stale(self, task: str) -> None:
        """Cancel the jobs of a task whose bundle is gone, or has been replaced since.

        May be repeated after the engine was unreachable.
        """
        bundle = self.tasks.get(task)
        digest = None if bundle is None else bundle.digest
        for job in self._waiter.jobs:
            if job.task == task and job.task_digest != digest:
                await self.engine.cancel(job.id)
        self._admission.delete(task)
        if task not in self.tasks:
            metrics.delete(task)

    async def to_response(self, status: JobStatus) -> PredictResponse:
        """The response of an ended job; its certificate, if any, can be requested from now on.

        Raises JobFailed with the problem of a job that did not succeed, and NotFound for a result
        whose bundle is gone.
        """
        bundle = self._bundle_of_success(status)
        if (signed := self._issuing.issue(status, bundle)) is not None:
            await self.engine.name(status.job.id, signed.document.id)
        return to_response(status, bundle.labels, signed)

    async def certificate(self, certificate_id: str, owner: str | None) -> SignedCertificate:
        """The certificate of this id, from a response to the same owner.

        Raises NotFound for any other id, and once the certificate's job or its bundle is gone.
        """
        job_id = await self.engine.named(certificate_id)
        if job_id is None:
            raise NotFound("There is no such certificate, or no longer")
        status = await self.status(job_id, owner)
        signed = self._issuing.issue(status, self._bundle_of(status.job))
        if signed is None:
            raise NotFound("There is no such certificate, or no longer")
        return signed

    def drain(self, grace_seconds: float) -> None:
        """Make `ended` raise Backlog after `grace_seconds`, for callers still waiting then."""
        self._waiter.drain(grace_seconds)

    async def close(self) -> None:
        """Stop the image threads, and watching and deleting jobs."""
        self._reader.close()
        await self._waiter.close()

    def _bundle_of_success(self, status: JobStatus) -> Bundle:
        """The bundle of a succeeded job; raises JobFailed for another job, and as `_bundle_of`."""
        if (document := problem(status)) is not None:
            raise JobFailed(document)
        return self._bundle_of(status.job)

    def _bundle_of(self, job: Job) -> Bundle:
        """The bundle of the job; raises NotFound once it is gone or replaced."""
        bundle = self.tasks.get(job.task)
        if bundle is None or bundle.digest != job.task_digest:
            raise NotFound(
                f"The task {as_json(job.task)} of this job is gone or was replaced; send the "
                "request again, with a new Idempotency-Key if you send one",
                job=job.id,
            )
        return bundle

    def _count_outcome(self, status: JobStatus) -> None:
        if status.job.demonstrates:
            metrics.DEMONSTRATIONS.labels(status.job.mode.value, status.state.value).inc()
            return
        try:
            response = to_response(status, self._bundle_of_success(status).labels)
        except Problem as error:  # There is no answer to count.
            if status.state is State.FAILED:
                logger.warning("a job failed: %s", error, extra=about([status.job]))
            return
        metrics.QUEUE_SECONDS.observe(response.timing_ms.queue / 1000)
        outcome = "abstained" if response.abstained else "answered"
        metrics.PREDICTIONS.labels(response.task, response.mode.value, outcome).inc()
        if not response.abstained and response.radius is not None:
            metrics.CERTIFIED_RADIUS.observe(response.radius)
