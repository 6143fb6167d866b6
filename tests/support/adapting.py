"""Shared parts of the tests of tasks: a store, the fake adaptation, and timeouts for it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from models.adaptation.plan import Plan
from service.config import Settings
from service.tasks.process import Patience
from service.tasks.store import Store
from service.tasks.supervisor import Supervisor
from service.tasks.task import Task
from tests.support.fake_adaptation import STARTS
from tests.support.serving import SECRET

FAKE = (sys.executable, str(Path(__file__).with_name("fake_adaptation.py")))
FAST = Patience(look=0.01, poll=0.02, restart=0.01)
PETS = ("cat", "dog")
PATIENT = 120
"""Seconds that a busy machine may take for a few processes."""


def make_store(data_dir: Path, **settings: Any) -> Store:
    return Store(Settings(data_dir=data_dir, **settings), SECRET)


def make_plan(ways: str = "plain", labels: tuple[str, ...] = PETS, **settings: Any) -> Plan:
    """A plan whose template selects the fake adaptation's behavior."""
    return Plan.checked(labels, template=f"{ways} {{}}", **{"shots": 1, **settings})


def create(store: Store, ways: str = "plain", owner: str | None = None, **settings: Any) -> Task:
    """A queued task."""
    return store.create(make_plan(ways, **settings), f"a {ways} task", owner)


def starts(store: Store, task: Task) -> list[int]:
    """The ids of the processes that have begun the task's job."""
    path = store.jobs / task.id / STARTS
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@asynccontextmanager
async def supervising(store: Store, patience: Patience = FAST) -> AsyncIterator[asyncio.Event]:
    """A supervisor with the fake adaptation; the event stops it."""
    stop = asyncio.Event()
    running = asyncio.create_task(Supervisor(store, FAKE, patience).run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await running


async def until(holds: Callable[[], object]) -> None:
    """Run other tasks until the condition holds; fails where it never does."""
    async with asyncio.timeout(PATIENT):
        while not holds():  # noqa: ASYNC110 - files give nothing to wait on.
            await asyncio.sleep(0.01)


async def until_extended(redis: Redis, lock: str) -> None:
    """Returns once a lock's time to live has risen."""
    left = await redis.pttl(lock)
    async with asyncio.timeout(PATIENT):
        while (now := await redis.pttl(lock)) <= left:
            left = now
            await asyncio.sleep(0.01)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(holds: Callable[[], object]) -> None:
    """As `until`, without an event loop."""
    deadline = time.monotonic() + PATIENT
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
