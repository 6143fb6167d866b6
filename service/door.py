"""Who is let in before an image is decoded: a live worker serves the task, and the rows fit."""

from __future__ import annotations

import asyncio
import time

from models.bundle import Bundle
from service.admission import full, most_rows, over_quota, served_otherwise, unserved
from service.config import Settings
from service.engine import Capacity, Engine
from service.schemas import PredictRequest, invalid_field

ANNOUNCING_SECONDS = 5.0
"""How long questions wait for a live worker to announce a task, since it was first asked for."""


class Door:
    """Admits questions by what the engine can take, within the bounds of the settings."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings, self._engine = settings, engine
        self._asked: dict[str, float] = {}  # by task: when it was first asked for

    async def admit(
        self, asked: PredictRequest, bundle: Bundle, owner: str | None, *, may_be_known: bool
    ) -> str:
        """The digest under which live workers serve this bundle of the task, if the rows fit.

        What `may_be_known` is not refused by its rows here: the engine may have its answer already.
        Raises InvalidField, QuotaExceeded and Backlog.
        """
        capacity = await self._announced(asked.task, bundle, owner)
        digests = capacity.digests_of(asked.task, bundle)
        if not digests and not may_be_known:
            other = asked.task in capacity.digests
            raise served_otherwise(asked.task) if other else unserved(asked.task)
        bound, quota = self._settings.backlog_rows, self._settings.key_rows
        most = most_rows(owner, bound, quota)
        if asked.rows > most:
            detail = f"n = {asked.n} makes {asked.rows} rows, more than may ever wait at once"
            raise invalid_field("n", detail, asked.n, most)
        waiting, owned, speed = capacity.backlog_rows, capacity.owner_rows, capacity.rows_per_second
        if not may_be_known and owner is not None and owned + asked.rows > quota:
            raise over_quota(asked.rows, owned, quota, speed)
        if not may_be_known and waiting + asked.rows > bound:
            raise full(asked.rows, waiting, speed)
        return digests[0] if digests else ""  # The engine refuses a new job of no digest.

    def forget(self, task: str) -> None:
        """The task is gone, or another by now, which is new to the workers too."""
        self._asked.pop(task, None)

    async def _announced(self, task: str, bundle: Bundle, owner: str | None) -> Capacity:
        """The engine's capacity; a live worker is given some seconds to find a task that is new."""
        deadline = self._asked.setdefault(task, time.monotonic()) + ANNOUNCING_SECONDS
        pause = 0.05
        while True:
            capacity = await self._engine.capacity(owner)
            found = capacity.digests_of(task, bundle) or not capacity.digests
            if found or time.monotonic() > deadline:
                return capacity
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)
