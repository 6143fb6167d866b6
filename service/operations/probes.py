"""The routes by which a process is watched: /livez, /readyz, /startupz and /metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import errors
from service.api.problems import render_problem
from service.operations import metrics as telemetry
from service.operations.health import Condition, Health
from service.operations.http_semantics import HeadRequests
from service.predictions.schemas import HealthResponse

ERRORS = (errors.Problem, HTTPException, RequestValidationError, Exception)
"""What an app answers with a problem document."""


def _health(request: Request) -> Health:
    health: Health = request.app.state.health
    return health


Probe = Annotated[Health, Depends(_health)]

probes = APIRouter(tags=["operation"])
metrics = APIRouter(tags=["operation"])


def probes_app(health: Health) -> FastAPI:
    """An app of the probes and metrics alone, for a process that answers nothing else."""
    app = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(ERRORS, render_problem))
    app.state.health = health
    app.add_middleware(HeadRequests)
    app.include_router(probes)
    app.include_router(metrics)
    return app


@metrics.get("/metrics", response_class=Response)
async def get_metrics(health: Probe) -> Response:
    """Metrics for Prometheus."""
    queue, open_jobs = await asyncio.gather(health.queue(), health.open_jobs())
    return Response(telemetry.exposition(queue, open_jobs), media_type=CONTENT_TYPE_LATEST)


@probes.get("/livez")
async def livez() -> HealthResponse:
    """The process answers."""
    return HealthResponse(status="ok", detail="")


@probes.get("/readyz", responses={503: {"model": HealthResponse}})
async def readyz(health: Probe, response: Response) -> HealthResponse:
    """The process can answer now: in a fleet for jobs that ended, even while no worker lives."""
    return _probed(await health.ready(), response)


@probes.get("/startupz", responses={503: {"model": HealthResponse}})
async def startupz(health: Probe, response: Response) -> HealthResponse:
    """The process was ready once."""
    return _probed(await health.startup(), response)


def _probed(condition: Condition, response: Response) -> HealthResponse:
    response.status_code = 200 if condition.is_well else 503
    status: Literal["ok", "unavailable"] = "ok" if condition.is_well else "unavailable"
    return HealthResponse(status=status, detail=condition.detail)
