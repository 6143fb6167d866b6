"""Fixtures of these tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import (
    Engine,
    Worker,
)
from tests.support.engines import HARNESSES, Harness
from tests.support.working import OTHER


@pytest.fixture
async def engine() -> MemoryEngine:
    """An engine of small shards that takes jobs at once."""
    built = MemoryEngine(
        EngineOptions(shard_rows=10, lease_seconds=5, worker_seconds=60), poll_seconds=0.01
    )
    await built.pull(Worker("someone", {"default": "bundle-a", "birds": "bundle-b"}), 1)
    return built


@pytest.fixture(params=HARNESSES)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[Harness]:
    """Each engine, of a worker that serves the default task."""
    built = HARNESSES[request.param](request)
    await built.engine.pull(OTHER, 1)
    yield built
    await built.close()


@pytest.fixture
def either(harness: Harness) -> Engine:
    return harness.engine
