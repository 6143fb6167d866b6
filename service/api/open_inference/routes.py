"""Endpoints of the Open Inference Protocol (v2): docs/protocol.md."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import JSONResponse, Response

from service import errors
from service.api.auth import caller
from service.api.open_inference.schemas import Live, ModelMetadata, ServerMetadata, TensorMetadata
from service.api.open_inference.tensors import (
    BINARY_OUTPUT,
    IMAGE,
    OUTPUTS,
    parse,
    response,
    wanted_outputs,
)
from service.api.predictions import Caller, Service, answered, disconnected, submitted
from service.api.requests import read_body, validated
from service.operations import metrics
from service.operations.probes import Probe
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from service.validation import invalid_field

PREFIX = "/v2"
HeaderLength = Annotated[int | None, Header(ge=2)]

health_routes = APIRouter(prefix=PREFIX, tags=["open inference"])
routes = APIRouter(prefix=PREFIX, tags=["open inference"], dependencies=[Depends(caller)])


@health_routes.get("/health/live")
async def live() -> Live:
    """The process answers."""
    return Live()


@health_routes.get("/health/ready")
async def ready(request: Request, health: Probe) -> Response:
    """The process can answer, and a worker computes for it: 200, else 503."""
    condition = await health.ready()
    if condition.is_well:
        predictions: Predictions = request.app.state.services.predictions
        if (await predictions.engine.capacity()).digests:
            return JSONResponse({"ready": True})
    return JSONResponse({"ready": False, "error": condition.detail or "No worker is alive"}, 503)


@routes.get("")
async def server() -> ServerMetadata:
    """Name, version and extensions of this server."""
    return ServerMetadata(
        name="vouchsafe", version=metrics.VERSION, extensions=["binary_tensor_data"]
    )


@routes.get("/models/{task}")
async def model(task: str, predictions: Service) -> ModelMetadata:
    """A task's inputs, outputs and versions."""
    return _described(*await _served(predictions, task, None))


@routes.get("/models/{task}/versions/{version}")
async def model_version(task: str, version: str, predictions: Service) -> ModelMetadata:
    """A task's inputs, outputs and versions, where a live worker serves this one."""
    return _described(*await _served(predictions, task, version))


@routes.get("/models/{task}/ready")
async def model_ready(task: str, predictions: Service) -> Response:
    """Whether a live worker serves the task: 200, else 503."""
    _, served = await _served(predictions, task, None)
    return JSONResponse({"ready": bool(served)}, 200 if served else 503)


@routes.get("/models/{task}/versions/{version}/ready")
async def model_version_ready(task: str, version: str, predictions: Service) -> Response:
    """200 where a live worker serves this version of the task, else 404."""
    await _served(predictions, task, version)
    return JSONResponse({"ready": True})


@routes.post("/models/{task}/infer")
async def infer(
    task: str,
    request: Request,
    predictions: Service,
    owner: Caller,
    inference_header_content_length: HeaderLength = None,
) -> Response:
    """Classify an image; the answer is that of POST /predict."""
    task, _ = await _served(predictions, task, None)
    return await _inferred(task, request, predictions, owner, inference_header_content_length)


@routes.post("/models/{task}/versions/{version}/infer")
async def infer_version(
    task: str,
    version: str,
    request: Request,
    predictions: Service,
    owner: Caller,
    inference_header_content_length: HeaderLength = None,
) -> Response:
    """The same, where a live worker serves this version; it need not be the one that answers."""
    task, _ = await _served(predictions, task, version)
    return await _inferred(task, request, predictions, owner, inference_header_content_length)


def _described(task: str, served: Sequence[str]) -> ModelMetadata:
    return ModelMetadata(
        name=task,
        versions=list(served),
        platform="vouchsafe",
        inputs=[
            TensorMetadata(name=IMAGE, datatype="BYTES", shape=[1]),
            TensorMetadata(name=IMAGE, datatype="UINT8", shape=[-1, -1, 3]),
        ],
        outputs=[
            TensorMetadata(name=name, datatype=datatype, shape=[1])
            for name, datatype in OUTPUTS.items()
        ],
    )


async def _inferred(
    task: str, request: Request, predictions: Predictions, owner: str | None, header: int | None
) -> Response:
    settings = request.app.state.services.settings
    body = await read_body(request, settings.max_body_bytes)
    # In a thread: millions of pixels become a PNG in half a second.
    asked, image = await asyncio.to_thread(parse, body, header)
    asked_id, wanted = asked.id, wanted_outputs(asked)
    question = _question(asked.parameters, image, task)
    job_id = await submitted(request, predictions, question, owner)
    del asked, body, image, question  # Frees their memory while the caller waits.
    leaving = partial(disconnected, request)
    status = await answered(predictions, job_id, settings.default_wait_seconds, leaving)
    return response(asked_id, await predictions.to_response(status), wanted)


def _question(parameters: Mapping[str, Any], image: bytes, task: str) -> PredictRequest:
    fields = {name: value for name, value in parameters.items() if name != BINARY_OUTPUT}
    own = {IMAGE: image, "task": task}
    if twice := sorted(fields.keys() & own.keys()):
        detail = f"parameters.{twice[0]}: the address names the task, and inputs have the image"
        raise invalid_field(twice[0], detail, fields[twice[0]])
    fields |= own
    return validated(lambda: PredictRequest.model_validate(fields), PredictRequest)


async def _served(
    predictions: Predictions, task: str, version: str | None
) -> tuple[str, tuple[str, ...]]:
    """A task's id, and the digests of it that live workers serve.

    Raises NotFound for an unknown task, and for a version that is none of the digests.
    """
    task = await predictions.task_id(task)
    capacity = await predictions.engine.capacity()
    served = capacity.digests_of(task, predictions.bundle(task))
    if version is not None and version not in served:
        raise errors.NotFound(f"No live worker serves version {version} of task {task}")
    return task, served
