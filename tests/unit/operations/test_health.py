from __future__ import annotations

import asyncio

import httpx
import pytest

from service.api.app import create_app
from service.api.services import Services
from service.config import Settings
from tests.support.serving import KEYS, SECRET, Service, problem, serving


async def test_not_ready_before_the_start() -> None:
    """Before the app has started nothing but its life is well."""
    client = Service(background_tasks=[]).client
    for probe, status in (("/livez", 200), ("/readyz", 503), ("/startupz", 503)):
        response = await client.get(probe)
        assert (response.status_code, response.json()["status"] == "ok") == (status, status == 200)
    await client.aclose()


async def test_an_api_alone_starts_but_is_not_ready() -> None:
    """Without its worker a service has not started, and its probes say what is missing."""
    async with serving(background_tasks=[]) as service:
        for probe in ("/startupz", "/readyz"):
            response = await service.client.get(probe)
            assert response.status_code == 503
            assert response.json()["detail"] == "no live worker serves any task"


async def test_an_api_whose_workers_are_elsewhere_is_well_without_them() -> None:
    """It is there to say when to ask again, and what became of earlier jobs."""
    async with serving(background_tasks=[], redis_url="redis://elsewhere") as service:
        for probe, detail in (("/startupz", ""), ("/readyz", "no live worker serves any task")):
            response = await service.client.get(probe)
            assert response.status_code == 200
            assert response.json() == {"status": "ok", "detail": detail}
        told = problem(await service.ask(), 503, "backlog")
        assert "No live worker" in told["detail"]


async def test_a_fleet_with_a_worker_is_ready_without_a_word() -> None:
    """The detail of an API process is empty while a worker serves."""
    async with serving(redis_url="redis://elsewhere") as service:
        body = {"status": "ok", "detail": ""}
        await service.until("/readyz", lambda found: found.json() == body)


@pytest.mark.parametrize("fault", [RuntimeError("broken"), None])
async def test_ended_background_task_ends_readiness(
    service: Service, fault: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A background task that fails, or just ends, takes readiness away; the rest still answers."""
    end = asyncio.Event()

    async def fragile(stop: asyncio.Event) -> None:
        await end.wait()
        if fault is not None:
            raise fault

    app = create_app(
        Services.build(Settings(), service.engine, service.catalog, SECRET, KEYS, [fragile])
    )
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
    async with app.router.lifespan_context(app), client:
        assert (await client.get("/readyz")).status_code == 200
        end.set()
        await asyncio.sleep(0.01)
        response = await client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["detail"] == "a part of the service has ended"
        assert (await client.get("/startupz")).status_code == 200
        assert (await client.get("/livez")).status_code == 200
    assert ("not ready any more" in caplog.text) == (fault is not None)


async def test_silent_engine_is_not_ready(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that does not answer takes readiness away, and metrics can still be read."""

    async def silent() -> None:
        raise ConnectionError("no engine")

    for name in ("capacity", "stats"):
        monkeypatch.setattr(service.engine, name, silent)
    assert (await service.client.get("/readyz")).json()["detail"] == "the engine does not answer"
    metrics = (await service.client.get("/metrics")).text
    assert "vouchsafe_engine_up 0.0" in metrics
    for name in ("queue_rows", "queue_oldest_seconds"):
        assert f'vouchsafe_{name}{{priority="hi"}} NaN' in metrics
        assert f'vouchsafe_{name}{{priority="lo"}} NaN' in metrics
    for name in ("workers", "queue_rows_per_second"):
        assert f"vouchsafe_{name} NaN" in metrics
    assert "vouchsafe_dead_letters" not in metrics


async def test_background_tasks_are_asked_to_stop() -> None:
    """At shutdown each background task's event is set, and a deaf one is cancelled after grace."""
    heard, cancelled = asyncio.Event(), asyncio.Event()

    async def polite(stop: asyncio.Event) -> None:
        await stop.wait()
        heard.set()

    async def deaf(stop: asyncio.Event) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(background_tasks=[polite, deaf], lease_seconds=0.05):
        await asyncio.sleep(0.01)
        assert not heard.is_set()
    assert heard.is_set()
    assert cancelled.is_set()
