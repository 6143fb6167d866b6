"""Endpoints of batches: one question about many images."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from service import errors
from service.api.auth import caller
from service.api.problems import KEYED, problem_responses
from service.api.requests import read_batch
from service.predictions.batches.schemas import BatchResponse, SignedManifest
from service.predictions.batches.service import Batches
from service.predictions.question import PredictRequest

MOST_IMAGES = 1_000
"""Most images of one batch."""
MOST_BYTES = 100 * 10**6
"""Largest body of a batch, in bytes; less where one key may have less in flight."""
NDJSON = "application/x-ndjson"


def _batches(request: Request) -> Batches:
    found: Batches = request.app.state.services.batches
    return found


Caller = Annotated[str | None, Depends(caller)]
Service = Annotated[Batches, Depends(_batches)]

batches = APIRouter(
    prefix="/batches", tags=["batches"], dependencies=[Depends(caller)], responses=KEYED
)


def _form_schema() -> dict[str, Any]:
    schema = PredictRequest.model_json_schema()
    del schema["properties"]["image"]
    schema["properties"]["alpha"]["description"] = (
        "Probability that any statement of the batch is wrong; each image has an equal share."
    )
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        "maxItems": MOST_IMAGES,
        "description": "JPEG, PNG or WebP files: the field is repeated.",
    }
    schema["properties"] = {"images": files, **schema["properties"]}
    return {"schema": schema | {"title": "BatchRequest", "required": ["images"]}}


@batches.post(
    "",
    status_code=202,
    response_model=BatchResponse,
    responses=problem_responses(
        errors.MalformedRequest,
        errors.NotFound,
        errors.BodyTimeout,
        errors.TaskFailed,
        errors.TooLarge,
        errors.UnsupportedMedia,
        errors.InvalidField,
        errors.IdempotencyMismatch,
        errors.TaskAmbiguous,
        errors.QuotaExceeded,
        errors.Backlog,
        errors.TaskNotReady,
    ),
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": _form_schema()}}
    },
)
async def create_batch(
    request: Request,
    service: Service,
    owner: Caller,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Makes a retry return the first request's batch",
        ),
    ] = None,
) -> Response:
    """Classify many images so that all statements together are wrong with probability alpha.

    Each of the m images gets alpha / m, repeats and unusable images counted.
    """
    settings = request.app.state.services.settings
    most_bytes = min(MOST_BYTES, settings.max_body_bytes_in_flight // 2)
    async with read_batch(request, most_bytes, MOST_IMAGES) as (question, files):
        names = [file.filename or "" for file in files]
        images = [file.file for file in files]
        batch = await service.create(question, images, names, owner, idempotency_key)
    headers = {"Location": f"/batches/{batch.id}"}
    return JSONResponse(batch.model_dump(mode="json"), 202, headers)


@batches.get("/{id}", responses=problem_responses(errors.NotFound))
async def get_batch(id: str, service: Service, owner: Caller) -> BatchResponse:
    """A batch's state and progress."""
    return await service.get(id, owner)


@batches.delete("/{id}", status_code=204, responses=problem_responses(errors.NotFound))
async def delete_batch(id: str, service: Service, owner: Caller) -> None:
    """Cancel a batch and erase it at once, with its jobs and its images."""
    await service.delete(id, owner)


@batches.get(
    "/{id}/results",
    response_class=Response,
    responses={
        200: {
            "description": "A line an image, as it ends: `index`, `name`, `state`, and `result` or "
            "`problem`; the response ends with the batch",
            "content": {NDJSON: {"schema": {"type": "string"}}},
        },
        **problem_responses(errors.NotFound),
    },
)
async def get_batch_results(id: str, service: Service, owner: Caller) -> StreamingResponse:
    """A batch's results as newline-delimited JSON; `result` is what POST /predict answers."""
    await service.get(id, owner)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(service.results(id), media_type=NDJSON, headers=headers)


@batches.get("/{id}/manifest", responses=problem_responses(errors.NotFound))
async def get_batch_manifest(id: str, service: Service, owner: Caller) -> SignedManifest:
    """The signed list of an ended batch's certificates, with what holds of all of them."""
    return await service.manifest(id, owner)
