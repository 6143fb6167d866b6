"""Jobs that vanish with the queue: lost, ask again; never cancelled, for nobody did that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from service.engine.protocol import Engine
from service.jobs import JobStatus, State
from service.predictions.service import Predictions
from tests.support.engines import ALPHA
from tests.support.fakes import EngineSpy, make_job
from tests.support.redis_fleet import Fleet, steady
from tests.support.serving import problem, serving
from tests.support.working import soon


class Forgetful(EngineSpy):
    """An engine that loses every job once `lost` is set: watches end with no end in sight."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.lost = asyncio.Event()
        self.watchers = 0

    async def submit(self, *asked: object, **more: object) -> str:
        return await self.engine.submit(*asked, **more)  # type: ignore[arg-type]

    async def status(self, job_id: str) -> JobStatus | None:
        return None if self.lost.is_set() else await self.engine.status(job_id)

    async def watch(self, job_id: str) -> AsyncIterator[JobStatus]:
        if (status := await self.status(job_id)) is not None:
            yield status
            self.watchers += 1
            await self.lost.wait()


async def test_who_waits_for_a_lost_job_is_told_to_ask_again() -> None:
    """The waiting caller gets a 503 that names the job, its events end with the same problem, and
    later the job is a 404."""
    async with serving() as service:
        service.voter.open.clear()
        predictions: Predictions = service.app.state.services.predictions
        forgetful = Forgetful(service.engine)
        predictions.engine = forgetful  # type: ignore[assignment]
        predictions._waiter._engine = forgetful  # type: ignore[assignment]
        waiting = asyncio.create_task(service.ask())
        await service.voter.busy.wait()
        job_id = service.voter.leases[0].job.id
        streaming = asyncio.create_task(service.client.get(f"/jobs/{job_id}/events"))
        await soon(lambda: forgetful.watchers == 2)
        forgetful.lost.set()
        told = problem(await waiting, 503, "job-lost")
        assert told["job"] == job_id
        assert (await waiting).headers["Retry-After"] == "1"
        events = (await streaming).text
        assert "event: progress" in events
        assert "urn:vouchsafe:problem:job-lost" in events
        problem(await service.client.get(f"/jobs/{job_id}"), 404, "not-found")


async def test_a_watch_tells_a_lost_job_from_a_cancelled_one(fleet: Fleet) -> None:
    """Where Redis lost a job its watch ends without an end; a deleted one was cancelled."""
    engine = fleet.engine
    seen: dict[str, list[JobStatus]] = {"lost": [], "deleted": []}

    async def watch(job_id: str) -> None:
        async for status in engine.watch(job_id):
            seen[job_id].append(status)

    await engine.pull(ALPHA, 0)
    for job_id in seen:
        await engine.submit(make_job(job_id))
    watching = asyncio.gather(*map(watch, seen))
    await steady(engine._subscriber)
    await soon(lambda: all(seen.values()))
    async with asyncio.timeout(60):
        await engine.delete("deleted")
        await fleet.redis.delete(f"{fleet.prefix}job:lost")
        await fleet.redis.publish(f"{fleet.prefix}changed:lost", "")
        await watching
    assert [status.state for status in seen["lost"]] == [State.QUEUED]
    assert seen["deleted"][-1].state is State.CANCELLED
    assert await fleet.redis.pttl(f"{fleet.prefix}cancelled:deleted") > 0
