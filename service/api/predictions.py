"""Endpoints of predictions and their jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from sse_starlette import EventSourceResponse, JSONServerSentEvent
from starlette.responses import JSONResponse, Response

from models.zoo.registry import DENOISER_SETS
from service import errors
from service.api.auth import caller
from service.api.problems import KEYED, problem_responses
from service.api.requests import Preferences, read_question
from service.jobs import JobStatus, State
from service.predictions.demonstrations import Asked
from service.predictions.question import ImageRequest, PredictRequest
from service.predictions.schemas import (
    DenoiserResponse,
    JobResponse,
    ModelResponse,
    ModelsResponse,
    PredictResponse,
)
from service.predictions.service import Predictions
from service.predictions.waiting import job_lost


def _predictions(request: Request) -> Predictions:
    predictions: Predictions = request.app.state.services.predictions
    return predictions


Caller = Annotated[str | None, Depends(caller)]
Service = Annotated[Predictions, Depends(_predictions)]
Prefer = Annotated[
    list[str] | None, Header(description="`respond-async`, `wait=SECONDS` (600 at most)")
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=255, description="Makes a retry return the first request's job"
    ),
]
Leaving = Coroutine[Any, Any, None]
"""Returns when the caller disconnects."""

routes = APIRouter(dependencies=[Depends(caller)], responses=KEYED)


def image_body(kind: type[ImageRequest]) -> dict[str, Any]:
    """OpenAPI's part of a request of this kind, as a form or as JSON."""
    content = {
        "multipart/form-data": _schema(kind, format="binary"),
        "application/json": _schema(kind, contentEncoding="base64"),
    }
    return {"requestBody": {"required": True, "content": content}}


def _schema(kind: type[ImageRequest], **encoding: str) -> dict[str, Any]:
    schema = kind.model_json_schema()
    description = schema["properties"]["image"]["description"]
    schema["properties"]["image"] = {"type": "string", "description": description, **encoding}
    return {"schema": schema}


PROBLEMS = (
    errors.MalformedRequest,
    errors.NotFound,
    errors.BodyTimeout,
    errors.JobCancelled,
    errors.TaskFailed,
    errors.TooLarge,
    errors.UnsupportedMedia,
    errors.InvalidField,
    errors.InvalidImage,
    errors.IdempotencyMismatch,
    errors.ShardDead,
    errors.TaskUnusable,
    errors.TaskAmbiguous,
    errors.QuotaExceeded,
    errors.TooManyOpen,
    errors.Backlog,
    errors.TaskNotReady,
    errors.EngineUnavailable,
    errors.JobLost,
    errors.Overloaded,
)
"""The problems of a request about an image."""


@routes.post(
    "/predict",
    tags=["predictions"],
    response_model=PredictResponse,
    responses={
        202: {"model": JobResponse, "description": "Accepted, with `Prefer: respond-async`"},
        **problem_responses(*PROBLEMS, errors.DeadlinePassed),
    },
    openapi_extra=image_body(PredictRequest),
)
async def predict(
    request: Request,
    predictions: Service,
    owner: Caller,
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Classify an image, with a radius inside which the label is proven stable.

    A caller who disconnects before the answer cancels the job, unless the request has an
    Idempotency-Key.
    """
    settings, preferences = request.app.state.services.settings, Preferences.of(prefer or [])
    question = await predictions.resolved(
        await read_question(request, settings.max_body_bytes, PredictRequest)
    )
    job_id = await submitted(request, predictions, question, owner, idempotency_key)
    del question  # Frees the image's memory while the caller waits.
    wait = preferences.seconds(settings.default_wait_seconds)
    leaving = None if idempotency_key else partial(disconnected, request)
    if not preferences.respond_async:
        return await predictions.to_response(await answered(predictions, job_id, wait, leaving))
    if (status := await predictions.ended(job_id, wait, leaving)) is not None:
        return await predictions.to_response(status)
    return _accepted(await predictions.to_job_response(await predictions.status(job_id, owner)))


async def submitted(
    request: Request,
    predictions: Predictions,
    question: Asked,
    owner: str | None,
    idempotency_key: str | None = None,
) -> str:
    """The id of the question's job; the body's bytes are free from then on."""
    job_id = await predictions.submit(question, owner, idempotency_key, request.state.traceparent)
    request.state.job, request.state.task = job_id, question.task
    request.state.body.release()
    return job_id


async def answered(
    predictions: Predictions, job_id: str, wait: int, leaving: Callable[[], Leaving] | None
) -> JobStatus:
    """The job's last status; raises DeadlinePassed after `wait` seconds, and as `ended`."""
    status = await predictions.ended(job_id, wait, leaving)
    if status is None:
        status = await predictions.finished_early(job_id)
    if status is None:
        detail = f"Not ready after {wait} s; the job goes on: request /jobs/{job_id}"
        raise errors.DeadlinePassed(detail, job=job_id)
    return status


async def disconnected(request: Request) -> None:
    """Return when the caller has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _accepted(job: JobResponse) -> Response:
    headers = {"Location": f"/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return JSONResponse(job.model_dump(mode="json"), 202, headers)


@routes.get("/jobs/{id}", tags=["jobs"], responses=problem_responses(errors.NotFound))
async def get_job(id: str, predictions: Service, owner: Caller) -> JobResponse:
    """A job's state and progress; `result` is what the waiting call would have returned."""
    return await predictions.to_job_response(await predictions.status(id, owner))


@routes.delete(
    "/jobs/{id}", tags=["jobs"], status_code=204, responses=problem_responses(errors.NotFound)
)
async def delete_job(id: str, predictions: Service, owner: Caller) -> None:
    """Cancel a job and erase it at once, its image included."""
    await predictions.status(id, owner)
    await predictions.engine.delete(id)


@routes.get(
    "/jobs/{id}/events",
    tags=["jobs"],
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "`progress` events, of an early-stopping job `bound` events too, then "
            "one `result` or `problem`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problem_responses(errors.NotFound),
    },
)
async def get_job_events(id: str, predictions: Service, owner: Caller) -> EventSourceResponse:
    """A job's progress as server-sent events, ending with its result or its problem."""
    await predictions.status(id, owner)
    return EventSourceResponse(_events(predictions, id))


async def _events(predictions: Predictions, job_id: str) -> AsyncIterator[JSONServerSentEvent]:
    status, looks_sent = None, 0
    try:
        async for status in predictions.engine.watch(job_id):
            job = (await predictions.to_job_response(status)).model_dump(mode="json")
            if status.state is State.SUCCEEDED:
                yield JSONServerSentEvent(job["result"], event="result")
            elif status.state.ended:
                yield JSONServerSentEvent(job["problem"], event="problem")
            else:
                looks = len(status.looks)
                if looks > looks_sent and (bound := predictions.proven_so_far(status)) is not None:
                    looks_sent = looks
                    yield JSONServerSentEvent(bound, event="bound")
                progress = {name: job[name] for name in ("state", "progress", "rows_done", "rows")}
                yield JSONServerSentEvent(progress, event="progress")
        if status is None or not status.state.ended:
            raise job_lost(job_id)
    except errors.Problem as problem:
        yield JSONServerSentEvent(problem.document(), event="problem")


@routes.get("/models", tags=["predictions"])
async def get_models(predictions: Service) -> ModelsResponse:
    """Every task, its labels, and whether a worker serves it now."""
    capacity = await predictions.engine.capacity()
    served = {task: capacity.digests_of(task, bundle) for task, bundle in predictions.tasks.items()}
    return ModelsResponse(
        models=[
            ModelResponse(
                task=task,
                name=bundle.name,
                id=bundle.id,
                labels=list(bundle.labels),
                resolution=bundle.resolution,
                denoiser=bundle.denoiser.kind,
                classifier=bundle.classifier.kind,
                licence=bundle.licence,
                k=bundle.k,
                largest_sigma=bundle.largest_sigma,
                bundle=next(iter(served[task]), None),
                ready=bool(served[task]),
            )
            for task, bundle in predictions.tasks.items()
        ],
        denoisers=[
            DenoiserResponse(name=name, words=None if known.words is None else list(known.words))
            for name, known in DENOISER_SETS.items()
        ],
    )
