"""The app over the in-process engine, a worker that only votes, and a client of the app."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from PIL import Image

from models.bundle import Base, Bundle
from service.api.app import create_app
from service.api.services import Services
from service.background import BackgroundTask
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Lease, Worker
from service.signing import SigningKeys
from service.tasks.catalog import Catalog
from tests.support.fakes import FakeClock

SECRET = b"s" * 32
KEYS = SigningKeys(b"k" * 32, SECRET)
LABELS = ("ant", "bee", "cat", "dog")
RESOLUTION = 8
PIXELS = np.random.default_rng(5).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
TASKS = {
    "default": Bundle(
        id="small",
        labels=LABELS,
        template="a {}",
        prompt="a thing",
        k=1.8,
        resolution=RESOLUTION,
        largest_sigma=1.0,
        denoiser=Base("fake-denoiser"),
        classifier=Base("fake-classifier"),
        licence="none",
        files={},
    )
}


NUMERICS = {"device": "none"}
DIGEST = TASKS["default"].served_digest(NUMERICS)


def png(pixels: Any = PIXELS) -> bytes:
    """An image file of these pixels (H, W, 3)."""
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PNG = png()


def nine_of_ten(rows: int) -> list[int]:
    """Votes: nine tenths for the cat, the rest for the ant."""
    return [rows // 10, 0, rows - rows // 10, 0]


def split(rows: int) -> list[int]:
    """Votes too even for a label."""
    return [rows - rows // 2, rows // 2, 0, 0]


class Voter:
    """A worker without a model: waits for `open`, then votes, or fails on request.

    `busy` is set once it holds a lease. Demonstrations have its `result`.
    """

    def __init__(self, engine: MemoryEngine, votes: Callable[[int], list[int]]) -> None:
        self.engine = engine
        self.votes = votes
        self.open = asyncio.Event()
        self.open.set()
        self.busy = asyncio.Event()
        self.fails = False
        self.result = b""
        self.bundles = {"default": DIGEST}
        self.numerics = [NUMERICS]
        self.leases: list[Lease] = []

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            leases = await self.engine.pull(Worker("voter", dict(self.bundles), self.numerics), 100)
            self.leases += leases
            await self.engine.start(leases)
            if leases:
                self.busy.set()
                await self.open.wait()
            for lease in leases:
                await self._vote(lease)

    async def _vote(self, lease: Lease) -> None:
        if self.fails:
            await self.engine.fail(lease, {"detail": "the device is broken"})
        else:
            result = self.result if lease.job.demonstrates else b""
            await self.engine.commit(lease, self.votes(lease.shard.rows), result)


class Service:
    """The app with its engine, its voter and `more` (or only `background_tasks`) and a client."""

    def __init__(
        self,
        votes: Callable[[int], list[int]] = nine_of_ten,
        background_tasks: Sequence[BackgroundTask] | None = None,
        more: Sequence[BackgroundTask] = (),
        backlog_rows: int = 10_000,
        **settings: Any,
    ) -> None:
        self.engine = MemoryEngine(
            EngineOptions(shard_rows=50, max_queue_rows=backlog_rows),
            poll_seconds=0.01,
            clock=FakeClock(),
        )
        self.voter = Voter(self.engine, votes)
        running = [self.voter.run, *more] if background_tasks is None else background_tasks
        configured = Settings(max_queue_rows=backlog_rows, **settings)
        self.catalog = Catalog(TASKS, configured.data_dir / "tasks", configured.models_folder)
        self.app = create_app(
            Services.build(configured, self.engine, self.catalog, SECRET, KEYS, running)
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://service")

    def serve(self, task: str) -> None:
        """Have the voter serve the bundle that the task has now."""
        self.voter.bundles[task] = self.catalog[task].served_digest(NUMERICS)

    async def ask(self, image: bytes = PNG, headers: Any = None, **fields: Any) -> httpx.Response:
        """POST /predict as a form."""
        return await self.client.post(
            "/predict", files={"image": ("i", image)}, data=fields, headers=headers
        )

    async def ask_json(self, headers: Any = None, **fields: Any) -> httpx.Response:
        """POST /predict as JSON."""
        body = {"image": b64encode(PNG).decode(), **fields}
        return await self.client.post("/predict", json=body, headers=headers)

    async def until(self, path: str, holds: Callable[[httpx.Response], bool]) -> httpx.Response:
        """The response to a GET of a path, once the condition holds; waits at most five seconds."""
        for _ in range(1000):
            if holds(response := await self.client.get(path)):
                return response
            await asyncio.sleep(0.005)
        raise AssertionError(f"{path} still answers {response.text}")

    async def until_state(self, location: str, state: str) -> dict[str, Any]:
        """The job once it is in this state."""
        response = await self.until(location, lambda found: found.json()["state"] == state)
        job: dict[str, Any] = response.json()
        return job


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Service]:
    """A running service, ready where it has a worker.

    Options as for Service; the data directory is a new one unless given.
    """
    with TemporaryDirectory() as folder:
        service = Service(**{"data_dir": Path(folder), **options})
        async with service.app.router.lifespan_context(service.app), service.client:
            if options.get("background_tasks") is None:
                await service.until("/readyz", lambda found: found.status_code == 200)
            try:
                yield service
            finally:
                service.voter.open.set()


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The problem document of the response, after checking its status and type."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"urn:vouchsafe:problem:{slug}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    return document
