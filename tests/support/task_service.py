"""The app with adaptation jobs, and tasks made by it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from service.tasks.supervisor import Supervisor
from tests.support.adapting import FAKE, FAST, make_store
from tests.support.serving import Service, serving


def body(ways: str = "plain", **fields: Any) -> dict[str, Any]:
    """A request that the fake adaptation goes about in one of its ways."""
    return {"labels": ["cat", "dog"], "template": f"{ways} {{}}", "shots": 1, **fields}


@asynccontextmanager
async def adapting(data_dir: Path, **settings: Any) -> AsyncIterator[Service]:
    """A service that makes tasks with the fake adaptation."""
    supervisor = Supervisor(make_store(data_dir, **settings), FAKE, FAST)
    async with serving(more=[supervisor.run], data_dir=data_dir, **settings) as service:
        yield service


@asynccontextmanager
async def idle(data_dir: Path, **settings: Any) -> AsyncIterator[Service]:
    """A service that queues tasks and never makes them."""
    async with serving(data_dir=data_dir, **settings) as service:
        yield service


async def made(service: Service, ways: str = "plain", **fields: Any) -> str:
    """The address of a task that is ready."""
    location = (await service.client.post("/tasks", json=body(ways, **fields))).headers["location"]
    await service.until_state(location, "ready")
    return str(location)
