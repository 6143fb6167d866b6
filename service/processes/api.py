"""API process of a fleet: shares its work with worker processes over Redis; loads no torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from functools import partial

from fastapi import FastAPI, Request
from redis.asyncio import Redis
from redis.exceptions import RedisError
from starlette.responses import Response

from models.bundle import DEFAULT_TASK, read_bundle
from service.api.app import create_app
from service.api.problems import render_problem
from service.api.services import Services
from service.background import sleep_or_stop
from service.config import Settings
from service.engine.connection import UNREACHABLE
from service.engine.options import EngineOptions
from service.engine.protocol import RETRY_SECONDS
from service.engine.redis.client import connect
from service.engine.redis.engine import PREFIX, RedisEngine
from service.errors import EngineUnavailable
from service.secrets import load_secret
from service.signing import SigningKeys
from service.tasks.catalog import Catalog
from service.tasks.lock import RedisLocks
from service.tasks.store import Store

logger = logging.getLogger("vouchsafe")

VOLUME = f"{PREFIX}volume"
"""Redis key that holds the id of the data directory of all API processes."""
VOLUME_SECONDS = 300
"""Seconds that the key outlives the last API process."""
LOOK_SECONDS = 5.0
BATCH_LOCK_SECONDS = 10.0
"""Seconds after which another API process takes up the batches of a killed one."""
STRANGER = (
    "other API processes of this Redis have another data directory than {}, and so another noise "
    "secret: the same image would be another trial with each. Give all of them the same "
    "VOUCHSAFE_DATA_DIR, or this one a Redis of its own; if the other directory was given up, "
    "wait for 5 minutes"
)
"""Why an API process with another data directory must end."""


def create_api(settings: Settings, on_stranger: Callable[[str], None] = logger.error) -> FastAPI:
    """The application over the Redis that the settings name.

    Any number of API processes may share a Redis. All of them need the same data directory, which
    holds the noise secret and the tasks. Where others have another directory, `on_stranger` is
    called with the reason why this process must end.

    Raises SecretError, ValueError where VOUCHSAFE_REDIS_URL is not set, and BundleError where the
    default task is damaged.
    """
    if settings.redis_url is None:
        raise ValueError("VOUCHSAFE_REDIS_URL is not set")
    url = settings.redis_url.get_secret_value()
    shared = connect(url)
    engine = RedisEngine(shared, EngineOptions.from_settings(settings))
    locks = RedisLocks(shared, seconds=BATCH_LOCK_SECONDS, kind="batch")
    secret = load_secret(settings.data_dir, settings.noise_secret_file)
    keys = SigningKeys.from_settings(settings, secret)
    store = Store(settings, secret)
    catalog = Catalog({"default": read_bundle(DEFAULT_TASK)}, store.tasks, store.models)
    holding = partial(_hold_volume, connect(url), store, on_stranger)
    services = Services.build(settings, engine, catalog, secret, keys, [holding], locks)
    app = create_app(services)
    app.add_exception_handler(RedisError, _unreachable)
    return app


async def _hold_volume(
    redis: Redis, store: Store, on_stranger: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Keep the data directory's id in Redis until `stop`, or until Redis holds another id."""
    async with aclosing(redis):
        volume = await asyncio.to_thread(store.volume)
        while not stop.is_set():
            with suppress(*UNREACHABLE):  # Requests and probes report it.
                if not await is_shared(redis, volume):
                    on_stranger(STRANGER.format(store.jobs.parent))
                    return
            await sleep_or_stop(stop, LOOK_SECONDS)


async def is_shared(redis: Redis, volume: str) -> bool:
    """Whether Redis holds this id of a data directory, or held none; renews the key."""
    known = await redis.set(VOLUME, volume, nx=True, get=True, ex=VOLUME_SECONDS)
    if known is not None and known != volume.encode():
        return False
    await redis.expire(VOLUME, VOLUME_SECONDS)
    return True


async def _unreachable(request: Request, error: Exception) -> Response:
    """The response where Redis has been unreachable for longer than a call may wait."""
    logger.warning("Redis does not answer: %s", error)
    detail = (
        "The queue does not answer now; ask again, with the same Idempotency-Key if you sent one"
    )
    return await render_problem(request, EngineUnavailable(detail, retry_after=RETRY_SECONDS))
