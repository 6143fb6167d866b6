"""What an API process of a fleet tells workers of adaptation jobs, and Redis made to agree with the
folders."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError

from service.background import sleep_or_stop
from service.engine.redis.adaptations import Adaptations, AnotherVolume
from service.tasks.repository import TaskRepository
from service.tasks.store import Store

logger = logging.getLogger("vouchsafe.tasks")
T = TypeVar("T")

RENEWALS = 1 / 6
"""The share of a lease between two renewals, and between two looks at Redis."""
NOTICE_SECONDS = 2.0
"""Longest that a caller of the API waits for Redis; a runner does until a renewal is due."""
STRANGER = (
    "other API processes of this Redis have another data directory than {}, and so another noise "
    "secret: the same image would be another trial with each. Give all of them the same "
    "VOUCHSAFE_DATA_DIR, or this one a Redis of its own; if the other directory was given up, "
    "wait for ten leases (5 minutes)"
)
"""Why an API process must not go on."""


class Away(Exception):
    """Redis did not answer; the log says so."""


class Line:
    """Asks Redis with a limit of time, and writes one line of log for each outage."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._away = False

    async def ask(self, asking: Awaitable[T]) -> T:
        """The answer; raises Away."""
        try:
            async with asyncio.timeout(self._seconds):
                answer = await asking
        except (RedisError, OSError, TimeoutError) as error:
            if not self._away:
                told = str(error) or type(error).__name__
                logger.warning("adaptation jobs wait, for Redis does not answer: %s", told)
            self._away = True
            raise Away from error
        if self._away:
            logger.info("adaptation jobs go on: Redis answers again")
        self._away = False
        return answer


class FleetNotices:
    """Tells workers at once which jobs the API makes and removes; `store` is the API's own.

    Where Redis is out of reach, the reconciler does it later: run `run` as a companion. Where the
    fleet has another data directory already, `on_stranger` is called with why this process must
    end.
    """

    def __init__(
        self,
        store: Store,
        adaptations: Adaptations,
        on_stranger: Callable[[str], None] = logger.error,
    ) -> None:
        self._store = store
        self._adaptations = adaptations
        self._on_stranger = on_stranger
        self._line = Line(NOTICE_SECONDS)

    async def announce(self, task_id: str) -> None:
        """A job is to be run."""
        await self._tell(self._adaptations.announce(task_id))

    async def retract(self, task_id: str) -> None:
        """A job was removed."""
        await self._tell(self._adaptations.retract(task_id))

    async def run(self, stop: asyncio.Event) -> None:
        """Reconcile Redis with the folders once a lease's time, until `stop`.

        Returns before where the fleet has another data directory.
        """
        try:
            while not stop.is_set():
                try:
                    volume = await asyncio.to_thread(self._store.made_volume)
                    await self._line.ask(self._adaptations.claim(volume))
                    await reconcile_if_due(self._store, volume, self._adaptations, self._line)
                except AnotherVolume:
                    self._on_stranger(STRANGER.format(self._store.jobs.parent))
                    return
                except Away:
                    pass
                except Exception:
                    logger.exception("adaptation jobs cannot be announced; trying again")
                await sleep_or_stop(stop, self._adaptations.lease_seconds * RENEWALS)
        finally:
            await self._adaptations.close()

    async def _tell(self, telling: Awaitable[None]) -> None:
        try:
            await self._line.ask(telling)
        except Away:
            return


async def reconcile_if_due(
    store: TaskRepository, volume: str, adaptations: Adaptations, line: Line
) -> None:
    """Add to Redis what the folders have, and drop what they have not, if nobody else just has.

    `volume` is the id that the folders had. Raises Away and AnotherVolume.
    """
    known = await line.ask(adaptations.survey(volume))
    if known is None:
        return
    unfinished = [task.id for task in await asyncio.to_thread(store.unfinished)]
    if await asyncio.to_thread(store.volume) != volume:
        return  # The volume went away, and its jobs with it.
    # Read after Redis was: a job that it has known for long and the folders have not has ended.
    surplus = [task_id for task_id in known if task_id not in unfinished]
    if added := await line.ask(adaptations.correct(unfinished, surplus)):
        logger.info("%d adaptation jobs that Redis did not know wait there now", added)
