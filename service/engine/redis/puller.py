"""One pull: which line a worker takes from, and the jobs whose shards it was given."""

from __future__ import annotations

import secrets
from weakref import WeakValueDictionary

from redis.asyncio import Redis

from service.engine.protocol import Lease, Worker
from service.engine.redis.client import Scripts, answered
from service.engine.redis.codec import lease_of, line_of, lost
from service.engine.scheduling import Candidate, next_offer
from service.jobs import Job, State, canonical_json


class Puller:
    """Takes leases, and keeps the jobs of those that anyone in this process still holds."""

    def __init__(
        self, redis: Redis, scripts: Scripts, prefix: str, starvation_seconds: float
    ) -> None:
        self._redis = redis
        self._scripts = scripts
        self._prefix = prefix
        self._starvation_seconds = starvation_seconds
        self._jobs: WeakValueDictionary[str, Job] = WeakValueDictionary()

    async def take(self, worker: Worker, rows: int, prefer_task: str | None) -> list[Lease]:
        """What waits for the worker now, as Engine.pull chooses; nothing where nothing does."""
        tasks = list(worker.bundles)
        lines = [line_of(*item) for item in worker.bundles.items()]
        known = (worker.id, worker.announcement())
        chosen = ""
        while True:
            call = secrets.token_hex(8)
            answer = await self._scripts.run("pull", *known, call, rows, chosen, *lines)
            taken, waiting = answer
            jobs = {name: await self._job(name.decode()) for name, *_ in taken}
            if leases := [lease_of(job, one) for one in taken if (job := jobs[one[0]])]:
                return leases
            offers = [
                Candidate(tasks[at], bool(fast), float(waited)) for at, fast, waited in waiting
            ]
            offer = next_offer(offers, prefer_task, self._starvation_seconds)
            if offer is None and not (taken or chosen):
                return []
            chosen = "" if offer is None else lines[tasks.index(offer.task)]

    async def _job(self, job_id: str) -> Job | None:
        """The job, read once for as long as this process holds leases of it; None: it is gone."""
        if job := self._jobs.get(job_id):
            return job
        async with self._redis.pipeline(transaction=True) as both:
            both.hget(f"{self._prefix}job:{job_id}", "job")
            both.get(f"{self._prefix}image:{job_id}")
            text, pixels = await answered(both.execute())
        if text is None:
            return None
        if pixels is None:
            problem = canonical_json(lost("image", job_id))
            await self._scripts.run("end", job_id, State.FAILED.value, problem)
            return None
        job = self._jobs[job_id] = Job.decode(text, pixels)
        return job
