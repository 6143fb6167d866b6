"""Admission before an image is decoded: a live worker serves the task, and the rows fit."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.bundle import Bundle
from service.config import Settings
from service.engine.limits import full, most_rows, over_quota, served_otherwise, unserved
from service.engine.protocol import Capacity, Engine
from service.predictions.demonstrations import Asked, DemonstrationRequest
from service.validation import invalid_field

ANNOUNCING_SECONDS = 5.0
"""Seconds, from a task's first request, in which a live worker may announce the task."""

MOST_SIGMAS = 128
"""Sigmas whose thresholds a worker caches (`models.noise`); any other is prepared again."""


def sigma_seconds(sigma: float) -> float:
    """Seconds that one core needs to prepare a sigma that is new to a worker (measured)."""
    return 0.01 + 0.09 * sigma


def check_rows(question: Asked, owner: str | None, settings: Settings) -> int:
    """The most rows that one question of the owner may have.

    Raises InvalidField for a question with more.
    """
    limit = most_rows(owner, settings.max_queue_rows, settings.max_queue_rows_per_key)
    if question.charge > limit:
        field = "kind" if isinstance(question, DemonstrationRequest) else "n"
        value = getattr(question, field)
        detail = f"{field} = {value} makes {question.charge} rows: at most {limit} may wait"
        raise invalid_field(field, detail, value, limit)
    return limit


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted question: the digest and the numerics that serve its bundle.

    `setup_rows` are charged beside its rows: for preparing its sigma, and for the steps of
    purifications and attacks.
    """

    digest: str
    setup_rows: int
    numerics: Mapping[str, Any]


class AdmissionControl:
    """Admits questions by the engine's capacity, within the limits of the settings."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings, self._engine = settings, engine
        self._first_requests: dict[str, float] = {}  # by task: time.monotonic()
        self._sigmas: OrderedDict[float, None] = OrderedDict()  # by last use, the oldest first

    async def admit(
        self, question: Asked, bundle: Bundle, owner: str | None, *, may_be_known: bool
    ) -> Admission:
        """The digest under which live workers serve the task's bundle, if the rows fit.

        A sigma that is not in recent use is charged as rows: those that a worker would compute
        while it prepares the sigma. A question that `may_be_known` is not rejected for its rows,
        since the engine may have its answer already.

        Raises InvalidField, QuotaExceeded and Backlog.
        """
        capacity, digests = await self._announced(question.task, bundle, owner)
        if not digests and not may_be_known:
            other = question.task in capacity.digests
            raise served_otherwise(question.task) if other else unserved(question.task)
        bound, quota = self._settings.max_queue_rows, self._settings.max_queue_rows_per_key
        limit = check_rows(question, owner, self._settings)
        waiting, owned, speed = capacity.backlog_rows, capacity.owner_rows, capacity.rows_per_second
        setup_rows = min(self._setup_rows(question.sigmas, speed), limit - question.charge)
        setup_rows += question.charge - question.rows
        charge = question.rows + setup_rows
        if not may_be_known and owner is not None and owned + charge > quota:
            raise over_quota(charge, owned, quota, speed)
        if not may_be_known and waiting + charge > bound:
            raise full(charge, waiting, speed)
        # The engine rejects a new job without a digest.
        digest = digests[0] if digests else ""
        served = (each for each in capacity.numerics if bundle.served_digest(each) == digest)
        return Admission(digest, setup_rows, next(served, {}))

    def delete(self, task: str) -> None:
        """Forget when the task was first requested: it is gone, or new to the workers again."""
        self._first_requests.pop(task, None)

    def _setup_rows(self, sigmas: Sequence[float], rows_per_second: float) -> int:
        seconds = sum(sigma_seconds(sigma) for sigma in sigmas if sigma not in self._sigmas)
        return math.ceil(seconds * rows_per_second)

    def prepared(self, sigmas: Sequence[float]) -> None:
        """Note that a question of these sigmas was queued, so that a worker prepares them."""
        for sigma in sigmas:
            self._sigmas[sigma] = None
            self._sigmas.move_to_end(sigma)
            if len(self._sigmas) > MOST_SIGMAS:
                self._sigmas.popitem(last=False)

    async def _announced(
        self, task: str, bundle: Bundle, owner: str | None
    ) -> tuple[Capacity, tuple[str, ...]]:
        """The engine's capacity, and the bundle's digests that live workers serve.

        Waits up to ANNOUNCING_SECONDS for a live worker to announce a new task.
        """
        deadline = self._first_requests.setdefault(task, time.monotonic()) + ANNOUNCING_SECONDS
        pause = 0.05
        while True:
            capacity = await self._engine.capacity(owner)
            digests = capacity.digests_of(task, bundle)
            if digests or not capacity.digests or time.monotonic() > deadline:
                return capacity, digests
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)
