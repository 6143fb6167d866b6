"""The HTTP application: endpoints over an engine, without models and torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from service.api.auth import caller
from service.api.batches import batches
from service.api.certificates import certificates
from service.api.demonstrations import demonstrations
from service.api.description import operation_id
from service.api.middleware import add_bounds, admitted
from service.api.open_inference.routes import health_routes as v2_health_routes
from service.api.open_inference.routes import routes as v2_routes
from service.api.pages import docs_assets, pages, static_files
from service.api.predictions import routes as predictions_routes
from service.api.problems import KEYED, PROBLEM_HANDLERS
from service.api.services import Services
from service.api.tasks import tasks
from service.operations import metrics
from service.operations.http_semantics import HeadRequests
from service.operations.probes import metrics_route, probe_routes

_DESCRIPTION = """What is in this picture, and how far could an attacker move its pixels before that
answer changes? **Certified means stable, not correct**: the label may be wrong, but with
probability 1 - alpha no perturbation inside the radius changes it."""


def create_app(services: Services) -> FastAPI:
    """The application over one process's services, which live as long as it runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.start()
        try:
            yield
        finally:
            await services.close()

    app = FastAPI(
        title="Vouchsafe",
        version=metrics.VERSION,
        description=_DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(admitted)],
        openapi_url=None,
        generate_unique_id_function=operation_id,
        exception_handlers=dict(PROBLEM_HANDLERS),
    )
    app.state.services, app.state.health = services, services.health
    app.add_middleware(HeadRequests)
    add_bounds(app, services.settings)
    app.add_middleware(metrics.RequestTelemetry)  # Outermost: records rejected requests too.
    include_routes(app)
    return app


def include_routes(app: FastAPI) -> None:
    """Add every route of the interface."""
    app.include_router(probe_routes)
    app.include_router(metrics_route, dependencies=[Depends(caller)], responses=KEYED)
    app.include_router(predictions_routes)
    app.include_router(batches)
    app.include_router(certificates)
    app.include_router(demonstrations)
    app.include_router(tasks)
    app.include_router(v2_health_routes)
    app.include_router(v2_routes)
    app.include_router(pages)
    app.mount("/docs/assets", docs_assets)
    app.mount("/static", static_files)
