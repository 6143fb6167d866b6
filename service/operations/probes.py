"""Routes that monitor a process: /livez, /readyz, /startupz and /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.operations import metrics
from service.operations.health import Condition, Health
from service.operations.http_semantics import HeadRequests


class HealthResponse(BaseModel):
    """A probe's response."""

    status: Literal["ok", "unavailable"] = Field(description="`ok` with 200, else with 503.")
    detail: str = Field(
        description="What the probe is waiting for. With `ok` it is empty, or reports that no live "
        "worker serves any task of a fleet: new questions get 503 until one does."
    )


def _health(request: Request) -> Health:
    health: Health = request.app.state.health
    return health


Probe = Annotated[Health, Depends(_health)]

probe_routes = APIRouter(tags=["operation"])
metrics_route = APIRouter(tags=["operation"])


def probes_app(health: Health, exception_handlers: Mapping[Any, Any]) -> FastAPI:
    """An app of the probes and metrics, for a process without other routes."""
    app = FastAPI(openapi_url=None, exception_handlers=dict(exception_handlers))
    app.state.health = health
    app.add_middleware(HeadRequests)
    app.include_router(probe_routes)
    app.include_router(metrics_route)
    return app


@metrics_route.get("/metrics", response_class=Response)
async def get_metrics(health: Probe) -> Response:
    """Metrics for Prometheus."""
    queue, open_jobs = await asyncio.gather(health.stats(), health.open_jobs())
    return Response(metrics.exposition(queue, open_jobs), media_type=CONTENT_TYPE_LATEST)


@probe_routes.get("/livez")
async def livez() -> HealthResponse:
    """The process answers."""
    return HealthResponse(status="ok", detail="")


@probe_routes.get("/readyz", responses={503: {"model": HealthResponse}})
async def readyz(health: Probe, response: Response) -> HealthResponse:
    """The process can answer now; in a fleet, for ended jobs even without a live worker."""
    return _probed(await health.ready(), response)


@probe_routes.get("/startupz", responses={503: {"model": HealthResponse}})
async def startupz(health: Probe, response: Response) -> HealthResponse:
    """The process was ready once."""
    return _probed(await health.startup(), response)


def _probed(condition: Condition, response: Response) -> HealthResponse:
    response.status_code = 200 if condition.is_well else 503
    status: Literal["ok", "unavailable"] = "ok" if condition.is_well else "unavailable"
    return HealthResponse(status=status, detail=condition.detail)
