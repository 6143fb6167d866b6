"""Which adaptation jobs are to be run, and who runs each: the stream that workers take from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Self

from redis.asyncio import Redis

from service.config import Settings
from service.engine.redis.client import Scripts, connect
from service.engine.redis.engine import PREFIX

_STAY_SECONDS = 86_400.0
"""How long Redis keeps what nobody touches; the jobs' folders are looked through far oftener."""
_VOLUME_LEASES = 10
"""Leases after which a volume is forgotten that no process of the fleet has asked for."""


class AnotherVolume(RuntimeError):
    """The jobs' folders are not the fleet's; where none are `known` yet, no API has told of any."""

    def __init__(self, known: bool) -> None:
        super().__init__("the jobs' folders are not those of the fleet")
        self.known = known


class Adaptations:
    """The stream `adapt`: one entry a job, which is leased to the worker that runs it.

    The jobs' folders are the truth, and this only tells who has which: lost, it is made again from
    them. An API claims the id of the `volume` that they lie on; with another nobody may take or
    correct anything. A lease is the group's pending entry and lasts `lease_seconds` from its last
    renewal. Jobs go in the order they were announced. Methods raise redis.exceptions.RedisError
    where Redis is out of reach.
    """

    def __init__(self, redis: Redis, *, lease_seconds: float = 30, prefix: str = PREFIX) -> None:
        self.lease_seconds = lease_seconds
        self._redis = redis
        terms = {
            "lease_ms": max(1, round(lease_seconds * 1000)),
            "stay_ms": round(_STAY_SECONDS * 1000),
            "volume_ms": max(1, round(lease_seconds * 1000 * _VOLUME_LEASES)),
        }
        self._scripts = Scripts(redis, prefix, terms)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The stream of the Redis that VOUCHSAFE_REDIS_URL names, with leases of 30 s at least.

        Raises ValueError where no URL is set.
        """
        if settings.redis_url is None:
            raise ValueError("VOUCHSAFE_REDIS_URL is not set")
        redis = connect(settings.redis_url.get_secret_value())
        return cls(redis, lease_seconds=max(30.0, settings.lease_seconds))

    async def claim(self, volume: str) -> None:
        """Make these folders the fleet's where it has none; raises AnotherVolume where it has."""
        _checked(await self._scripts.run("adapt_jobs", "claim", volume))

    async def announce(self, task_id: str) -> None:
        """A job is to be run; nothing changes where that is known."""
        await self._scripts.run("adapt_jobs", "announce", task_id)

    async def retract(self, task_id: str) -> None:
        """A job was removed: nobody takes it any more, and whoever runs it loses the lease."""
        await self._scripts.run("adapt_jobs", "retract", task_id)

    async def take(self, volume: str, worker_id: str, skip: Collection[str]) -> str | None:
        """Lease the first job there is, except for those to skip, to a worker that has none.

        Raises AnotherVolume.
        """
        taken = await self._scripts.run("adapt_jobs", "take", volume, worker_id, *skip)
        return None if (task_id := _checked(taken)) is None else task_id.decode()

    async def renew(self, task_id: str, worker_id: str, progress: float) -> int | None:
        """Extend the lease of a job that is so far (0 to 1); None where it is lost.

        Returns how many workers have lost the lease since the job last got further. Only a worker
        that ends the job by itself when its lease runs out may ask: where Redis has forgotten who
        runs the job, it is the worker that asks.
        """
        asked = task_id, worker_id, progress
        losses: int | None = await self._scripts.run("adapt_jobs", "renew", *asked)
        return losses

    async def release(self, task_id: str, worker_id: str) -> None:
        """Hand the job back for others to take; it counts as no loss."""
        await self._scripts.run("adapt_jobs", "release", task_id, worker_id)

    async def close_job(self, task_id: str, worker_id: str) -> None:
        """The worker's job has ended."""
        await self._scripts.run("adapt_jobs", "close", task_id, worker_id)

    async def survey(self, volume: str) -> list[str] | None:
        """The jobs that have been known for a lease's time, or None where it is not our turn.

        Of all processes one has its turn, once a lease's time; it goes on to `correct`. Raises
        AnotherVolume.
        """
        known = _checked(await self._scripts.run("adapt_jobs", "survey", volume))
        return None if known is None else [task_id.decode() for task_id in known]

    async def correct(self, missing: Sequence[str], surplus: Sequence[str]) -> int:
        """Add jobs that Redis does not know and drop others; returns how many were added.

        Those added wait for a lease's time: somebody may have run them since before Redis forgot.
        """
        if surplus:
            await self._scripts.run("adapt_jobs", "drop", *surplus)
        return int(await self._scripts.run("adapt_jobs", "hold", *missing)) if missing else 0

    async def close(self) -> None:
        """Give up what Redis was not told yet, and let go of every connection."""
        await self._scripts.close()
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()


def _checked(reply: Any) -> Any:
    """A script's reply; a number says that the volume is another."""
    if isinstance(reply, int):
        raise AnotherVolume(known=bool(reply))
    return reply
