"""The API of a fleet: networks and workers are elsewhere, Redis stands between, no torch here."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fastapi import FastAPI, Request
from redis.exceptions import RedisError
from starlette.responses import Response

from models.bundle import DEFAULT_TASK, read_bundle
from service.api.app import create_app
from service.api.problems import render_problem
from service.config import Settings
from service.engine.protocol import RETRY_SECONDS
from service.engine.redis.adaptations import Adaptations
from service.engine.redis.engine import RedisEngine
from service.errors import EngineUnavailable
from service.secrets import load_secret
from service.tasks.catalog import Catalog
from service.tasks.notices import FleetNotices
from service.tasks.store import Store

logger = logging.getLogger("vouchsafe")


def frontend(settings: Settings, on_stranger: Callable[[str], None] = logger.error) -> FastAPI:
    """The application over the Redis that the settings name; any number of them share its work.

    All of them need the same data directory, for the noise secret and the tasks are in it; where
    others have another, `on_stranger` is told why this process must end. Raises SecretError, and
    BundleError where the default task is damaged.
    """
    engine = RedisEngine.from_settings(settings)
    secret = load_secret(settings.data_dir, settings.noise_secret_file)
    store = Store(settings, secret)
    catalog = Catalog({"default": read_bundle(DEFAULT_TASK)}, store.tasks, store.models)
    notices = FleetNotices(store, Adaptations.from_settings(settings), on_stranger)
    app = create_app(settings, engine, catalog, secret, [notices.run], notices)
    app.add_exception_handler(RedisError, _unreachable)
    return app


async def _unreachable(request: Request, error: Exception) -> Response:
    """The answer where Redis has been out of reach for longer than a call may wait."""
    logger.warning("Redis does not answer: %s", error)
    detail = (
        "The queue does not answer now; ask again, with the same Idempotency-Key if you sent one"
    )
    return await render_problem(request, EngineUnavailable(detail, retry_after=RETRY_SECONDS))
