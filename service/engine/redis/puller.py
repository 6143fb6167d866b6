"""Pulls leases: the choice of a queue, and the jobs of the leased shards."""

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
    """Takes leases, and caches the jobs of the leases that this process still holds."""

    def __init__(
        self, redis: Redis, scripts: Scripts, prefix: str, starvation_seconds: float
    ) -> None:
        self._redis = redis
        self._scripts = scripts
        self._prefix = prefix
        self._starvation_seconds = starvation_seconds
        self._jobs: WeakValueDictionary[str, Job] = WeakValueDictionary()

    async def take(self, worker: Worker, rows: int, prefer_task: str | None) -> list[Lease]:
        """The leases of one pull, as Engine.pull defines it; empty where no shard waits."""
        tasks = list(worker.bundles)
        queues = [line_of(*item) for item in worker.bundles.items()]
        known = (worker.id, worker.announcement())
        chosen = ""
        while True:
            call = secrets.token_hex(8)
            taken, waiting = await self._scripts.run("pull", *known, call, rows, chosen, *queues)
            jobs = {name: await self._job(name.decode()) for name, *_ in taken}
            if leases := [lease_of(job, one) for one in taken if (job := jobs[one[0]])]:
                return leases
            offers = [
                Candidate(tasks[at], bool(fast), float(waited)) for at, fast, waited in waiting
            ]
            offer = next_offer(offers, prefer_task, self._starvation_seconds)
            if offer is None and not (taken or chosen):
                return []
            chosen = "" if offer is None else queues[tasks.index(offer.task)]

    async def _job(self, job_id: str) -> Job | None:
        """The job, or None where it is gone; read once while this process holds leases of it."""
        if job := self._jobs.get(job_id):
            return job
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hget(f"{self._prefix}job:{job_id}", "job")
            pipeline.get(f"{self._prefix}image:{job_id}")
            text, pixels = await answered(pipeline.execute())
        if text is None:
            return None
        if pixels is None:
            problem = canonical_json(lost("image", job_id))
            await self._scripts.run("end", job_id, State.FAILED.value, problem)
            return None
        job = self._jobs[job_id] = Job.decode(text, pixels)
        return job
