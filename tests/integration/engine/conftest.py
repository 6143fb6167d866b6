"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from benchmarks.redis_server import RedisServer
from service.engine.protocol import (
    Engine,
)
from tests.support.engines import ALPHA, BOTH, HARNESSES, Harness
from tests.support.fakes import make_job
from tests.support.redis_fleet import Fleet, Rollout


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """A fresh engine with the workers `alpha` and `both` alive."""
    built = HARNESSES[request.param](request)
    await built.engine.pull(ALPHA, 1)
    await built.engine.pull(BOTH, 1)
    yield built
    await built.close()


@pytest.fixture
def engine(harness: Harness) -> Engine:
    return harness.engine


@pytest.fixture
async def fleet(redis_server: RedisServer) -> AsyncIterator[Fleet]:
    """A fleet on the session's server, the worker `alpha` alive."""
    built = Fleet(redis_server.url)
    await built.engine.pull(ALPHA, 1)
    yield built
    if keys := await built.keys():
        await built.redis.delete(*keys)
    await built.close()


@pytest.fixture
async def rollout(redis_server: RedisServer) -> AsyncIterator[Rollout]:
    """A job under the digest of `alpha`, which is alive."""
    built = Rollout(redis_server.url)
    await built.engine.pull(ALPHA, 1)
    await built.engine.submit(make_job("a", owner="ada"))
    yield built
    await built.fleet.redis.delete(*await built.fleet.keys())
    await built.fleet.close()
