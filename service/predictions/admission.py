"""Who is let in before an image is decoded: a live worker serves the task, and the rows fit."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from dataclasses import dataclass

from models.bundle import Bundle
from service.config import Settings
from service.engine.limits import full, most_rows, over_quota, served_otherwise, unserved
from service.engine.protocol import Capacity, Engine
from service.predictions.schemas import PredictRequest
from service.validation import invalid_field

ANNOUNCING_SECONDS = 5.0
"""How long questions wait for a live worker to announce a task, since it was first asked for."""


MOST_SIGMAS = 128
"""Sigmas whose thresholds a worker keeps (`models.noise`); any other is prepared again."""


def sigma_seconds(sigma: float) -> float:
    """About how long one core takes to prepare a sigma that is new to a worker (measured)."""
    return 0.01 + 0.09 * sigma


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted question's bundle digest, and the rows that preparing its sigma is charged as."""

    digest: str
    setup_rows: int


class AdmissionControl:
    """Admits questions by what the engine can take, within the bounds of the settings."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings, self._engine = settings, engine
        self._asked: dict[str, float] = {}  # by task: when it was first asked for
        self._sigmas: OrderedDict[float, None] = OrderedDict()  # by last use, the oldest first

    async def admit(
        self, asked: PredictRequest, bundle: Bundle, owner: str | None, *, may_be_known: bool
    ) -> Admission:
        """The digest under which live workers serve this bundle of the task, if the rows fit.

        A sigma that was not asked for lately is charged with the rows that a worker could have
        computed in the time that it takes to prepare.

        What `may_be_known` is not refused by its rows here: the engine may have its answer already.
        Raises InvalidField, QuotaExceeded and Backlog.
        """
        capacity, digests = await self._announced(asked.task, bundle, owner)
        if not digests and not may_be_known:
            other = asked.task in capacity.digests
            raise served_otherwise(asked.task) if other else unserved(asked.task)
        bound, quota = self._settings.max_queue_rows, self._settings.max_queue_rows_per_key
        most = most_rows(owner, bound, quota)
        if asked.rows > most:
            detail = f"n = {asked.n} makes {asked.rows} rows, more than may ever wait at once"
            raise invalid_field("n", detail, asked.n, most)
        waiting, owned, speed = capacity.backlog_rows, capacity.owner_rows, capacity.rows_per_second
        setup_rows = min(self._setup_rows(asked.sigma, speed), most - asked.rows)
        charge = asked.rows + setup_rows
        if not may_be_known and owner is not None and owned + charge > quota:
            raise over_quota(charge, owned, quota, speed)
        if not may_be_known and waiting + charge > bound:
            raise full(charge, waiting, speed)
        # The engine refuses a new job of no digest.
        return Admission(digests[0] if digests else "", setup_rows)

    def delete(self, task: str) -> None:
        """The task is gone, or another by now, which is new to the workers too."""
        self._asked.pop(task, None)

    def _setup_rows(self, sigma: float, rows_per_second: float) -> int:
        if sigma in self._sigmas:
            return 0
        return math.ceil(sigma_seconds(sigma) * rows_per_second)

    def prepared(self, sigma: float) -> None:
        """A question of this sigma was queued, so a worker prepares it."""
        self._sigmas[sigma] = None
        self._sigmas.move_to_end(sigma)
        if len(self._sigmas) > MOST_SIGMAS:
            self._sigmas.popitem(last=False)

    async def _announced(
        self, task: str, bundle: Bundle, owner: str | None
    ) -> tuple[Capacity, tuple[str, ...]]:
        """The engine's capacity, and the bundle's digests that live workers serve.

        A live worker is given some seconds to find a task that is new.
        """
        deadline = self._asked.setdefault(task, time.monotonic()) + ANNOUNCING_SECONDS
        pause = 0.05
        while True:
            capacity = await self._engine.capacity(owner)
            digests = capacity.digests_of(task, bundle)
            if digests or not capacity.digests or time.monotonic() > deadline:
                return capacity, digests
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)
