"""Endpoints of tasks, which are made from labels."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from sse_starlette import EventSourceResponse, JSONServerSentEvent
from starlette.responses import JSONResponse, Response

from service import errors
from service.api.auth import caller
from service.api.problems import problem_responses
from service.api.requests import read_document
from service.tasks.schemas import TaskRequest, TaskResponse, TasksResponse
from service.tasks.service import TaskService

MOST_BYTES = 2**20
"""Largest body, in bytes, of a request for a task."""
MOST_LISTED = 1_000
"""Most tasks in one response."""


def _service(request: Request) -> TaskService:
    service: TaskService = request.app.state.services.tasks
    return service


Caller = Annotated[str | None, Depends(caller)]
Service = Annotated[TaskService, Depends(_service)]

tasks = APIRouter(
    prefix="/tasks",
    tags=["tasks"],
    dependencies=[Depends(caller)],
    responses=problem_responses(errors.Unauthorized),
)


@tasks.post(
    "",
    response_model=TaskResponse,
    responses={
        202: {"model": TaskResponse, "description": "Accepted; `Location` is the task's address"},
        **problem_responses(
            errors.MalformedRequest,
            errors.TooLarge,
            errors.UnsupportedMedia,
            errors.InvalidField,
            errors.Backlog,
            errors.StorageFull,
        ),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": TaskRequest.model_json_schema()}},
        }
    },
)
async def create_task(request: Request, service: Service, owner: Caller) -> Response:
    """Make a task from labels alone: 202 until it is ready, 200 from then on.

    The same labels and settings are the same task for every caller. A failed task is tried again.
    """
    task_request = await read_document(request, TaskRequest, MOST_BYTES)
    task = await service.create(task_request, owner)
    request.state.task = task.id
    status = 200 if task.state == "ready" else 202
    headers = {"Location": f"/tasks/{task.id}"}
    return JSONResponse(task.model_dump(mode="json"), status, headers)


@tasks.get("", responses=problem_responses(errors.InvalidField))
async def get_tasks(
    service: Service,
    limit: Annotated[
        int, Query(ge=1, le=MOST_LISTED, description=f"Most tasks, 1 to {MOST_LISTED}.")
    ] = 100,
    after: Annotated[
        str | None, Query(description="A task's id: only tasks made before it are listed.")
    ] = None,
) -> TasksResponse:
    """The tasks made from labels, the newest first; /models also lists the built-in task."""
    return await service.page(limit, after)


@tasks.get("/{id}", responses=problem_responses(errors.NotFound, errors.TaskAmbiguous))
async def get_task(id: str, service: Service) -> TaskResponse:
    """A task's state, by its id, or by a name that no other task has."""
    return await service.get(await service.resolve(id))


@tasks.delete(
    "/{id}", status_code=204, responses=problem_responses(errors.NotFound, errors.Forbidden)
)
async def delete_task(id: str, service: Service, owner: Caller) -> None:
    """Remove a task of the caller's key, with its job and its files."""
    await service.delete(id, owner)


@tasks.get(
    "/{id}/references/{file}",
    response_class=Response,
    responses={
        200: {"description": "A PNG file", "content": {"image/png": {}}},
        **problem_responses(errors.NotFound),
    },
)
async def get_reference(id: str, file: str, service: Service) -> Response:
    """One of the pictures that a task was made from."""
    picture = await service.reference(id, file)
    return Response(picture, media_type="image/png", headers={"X-Content-Type-Options": "nosniff"})


@tasks.get(
    "/{id}/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "`progress` events, then one `ready`, `problem` or `cancelled`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problem_responses(errors.NotFound),
    },
)
async def get_task_events(id: str, service: Service) -> EventSourceResponse:
    """A task's progress as server-sent events, ending with the task, its problem or its removal."""
    return EventSourceResponse(_events(service, await service.get(id)))


async def _events(service: TaskService, found: TaskResponse) -> AsyncIterator[JSONServerSentEvent]:
    names = {"state", "stage", "progress", "eta_seconds", "losses"}
    async for task in service.watch(found):
        if task is None or task.state == "cancelled":
            yield JSONServerSentEvent({"id": found.id}, event="cancelled")
        elif task.problem is not None:
            yield JSONServerSentEvent(task.problem, event="problem")
        elif task.state == "ready":
            yield JSONServerSentEvent(task.model_dump(mode="json"), event="ready")
        else:
            yield JSONServerSentEvent(task.model_dump(mode="json", include=names), event="progress")
