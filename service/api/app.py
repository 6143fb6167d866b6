"""The HTTP application: endpoints over an engine, without models and torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI

from service.api.auth import caller
from service.api.middleware import add_bounds, admitted
from service.api.pages import docs_assets, pages
from service.api.predictions import routes as predictions_routes
from service.api.problems import KEYED, PROBLEM_HANDLERS
from service.api.tasks import tasks
from service.background import BackgroundTask, BackgroundTasks
from service.config import Settings
from service.engine.protocol import Engine
from service.operations import metrics
from service.operations.health import Health
from service.operations.http_semantics import HeadRequests
from service.operations.probes import metrics_route, probe_routes
from service.predictions.service import Predictions
from service.tasks.catalog import Catalog
from service.tasks.service import TaskService
from service.tasks.store import Store

_DESCRIPTION = """What is in this picture, and how far could an attacker move its pixels before that
answer changes? **Certified means stable, not correct**: the label may be wrong, but with
probability 1 - alpha no perturbation inside the radius changes it."""


def create_app(
    settings: Settings,
    engine: Engine,
    catalog: Catalog,
    secret: bytes,
    background_tasks: Sequence[BackgroundTask] = (),
) -> FastAPI:
    """The application over an engine; `catalog` maps the `task` of a request to its bundle.

    `background_tasks` run for the app's lifetime. Each is called with an event that is set at
    shutdown, and has `lease_seconds` to end then.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running.start()
        following.start()
        try:
            yield
        finally:
            await running.stop()
            await following.stop()
            await predictions.close()
            await engine.close()

    running = BackgroundTasks(background_tasks, settings.lease_seconds)
    store = Store(settings, secret)
    task_service = TaskService(store, catalog)
    predictions = Predictions(settings, engine, catalog, secret, task_service.expect)
    following = BackgroundTasks([partial(catalog.follow, gone=predictions.cancel_stale)], 1.0)
    app = FastAPI(
        title="Vouchsafe",
        version=metrics.VERSION,
        description=_DESCRIPTION,
        lifespan=lifespan,
        dependencies=[Depends(admitted)],
        openapi_url=None,
        exception_handlers=dict(PROBLEM_HANDLERS),
    )
    app.state.settings = settings
    app.state.callers = settings.callers()
    app.state.predictions = predictions
    app.state.task_service = task_service
    app.state.health = Health(
        engine,
        catalog,
        running,
        open_jobs=store.open_jobs,
        workers_elsewhere=settings.redis_url is not None,
    )
    app.add_middleware(HeadRequests)
    add_bounds(app, settings)
    app.add_middleware(metrics.RequestTelemetry)  # Outermost: records rejected requests too.
    app.include_router(probe_routes)
    app.include_router(metrics_route, dependencies=[Depends(caller)], responses=KEYED)
    app.include_router(predictions_routes)
    app.include_router(tasks)
    app.include_router(pages)
    app.mount("/docs/assets", docs_assets)
    return app
