"""Endpoints of demonstrations."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse

from service import errors
from service.api.auth import caller
from service.api.predictions import (
    PROBLEMS,
    Caller,
    IdempotencyKey,
    Prefer,
    Service,
    disconnected,
    image_body,
    submitted,
)
from service.api.problems import KEYED, problem_responses
from service.api.requests import Preferences, read_question
from service.errors import JobFailed
from service.predictions.demonstrations import DemonstrationRequest, DemonstrationResponse

demonstrations = APIRouter(
    prefix="/demonstrations",
    tags=["demonstrations"],
    dependencies=[Depends(caller)],
    responses=KEYED,
)


@demonstrations.post(
    "",
    response_model=DemonstrationResponse,
    responses={
        202: {"model": DemonstrationResponse, "description": "Accepted, and not ready in time"},
        **problem_responses(*PROBLEMS),
    },
    openapi_extra=image_body(DemonstrationRequest),
)
async def demonstrate(
    request: Request,
    predictions: Service,
    owner: Caller,
    prefer: Prefer = None,
    idempotency_key: IdempotencyKey = None,
) -> Any:
    """Show what the networks see of an image, or attack it; this proves nothing.

    A caller who disconnects before the answer cancels the job, unless the request has an
    Idempotency-Key.
    """
    settings, preferences = request.app.state.services.settings, Preferences.of(prefer or [])
    wanted = await predictions.resolved(
        await read_question(request, settings.max_body_bytes, DemonstrationRequest)
    )
    job_id = await submitted(request, predictions, wanted, owner, idempotency_key)
    del wanted  # Frees the image's memory while the caller waits.
    wait = preferences.seconds(settings.default_wait_seconds)
    leaving = None if idempotency_key else partial(disconnected, request)
    if (status := await predictions.ended(job_id, wait, leaving)) is None:
        status = await predictions.status(job_id, owner, demonstrates=True)
        headers = {"Location": f"/demonstrations/{job_id}"}
        if preferences.respond_async:
            headers["Preference-Applied"] = "respond-async"
        return JSONResponse(predictions.to_demonstration(status).model_dump(), 202, headers)
    response = predictions.to_demonstration(status)
    if response.problem is not None:
        raise JobFailed(response.problem)
    return response


@demonstrations.get("/{id}", responses=problem_responses(errors.NotFound))
async def get_demonstration(id: str, predictions: Service, owner: Caller) -> DemonstrationResponse:
    """A demonstration's status, and its pictures once it is `done`."""
    return predictions.to_demonstration(await predictions.status(id, owner, demonstrates=True))


@demonstrations.delete("/{id}", status_code=204, responses=problem_responses(errors.NotFound))
async def delete_demonstration(id: str, predictions: Service, owner: Caller) -> None:
    """Cancel a demonstration and erase it at once, its image and its pictures included."""
    await predictions.status(id, owner, demonstrates=True)
    await predictions.engine.delete(id)
