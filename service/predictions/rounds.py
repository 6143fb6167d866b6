"""Looks at early-stopping questions: each round's votes lead to the next round or to the end."""

from __future__ import annotations

import asyncio

from models.anytime import Decision, Running, at_look, bound
from service.background import sleep_or_stop
from service.engine.connection import UNREACHABLE
from service.engine.protocol import Engine
from service.jobs import JobStatus
from service.predictions.results import early_stopping

_UNREACHABLE_SECONDS = 1.0
"""Seconds between two calls of an engine that is unreachable."""


async def keep_looking(engine: Engine, stop: asyncio.Event) -> None:
    """Extend or finish every job whose look is due, until `stop`.

    Any number of processes may do so at once. A process that is killed between two rounds leaves
    the job due, and another one goes on.
    """
    while not stop.is_set():
        try:
            for status in await engine.due():
                await look(engine, status)
        except UNREACHABLE:
            await sleep_or_stop(stop, _UNREACHABLE_SECONDS)


async def look(engine: Engine, status: JobStatus) -> None:
    """Extend a due job by its next round, or finish it."""
    job, looks = status.job, (*status.looks, status.estimation)
    if at_look(early_stopping(job), status.selection, looks) is Decision.CONTINUE:
        await engine.extend(job.id, job.looks[len(looks)])
    else:
        await engine.finish(job.id, sum(status.estimation))


async def finish_early(engine: Engine, status: JobStatus) -> bool:
    """Finish an open job without a target radius at its last whole look; False where none is."""
    if status.job.method != "anytime" or status.job.target_radius is not None:
        return False
    looks = (*status.looks, status.estimation) if status.due else status.looks
    return bool(looks) and await engine.finish(status.job.id, sum(looks[-1]))


def proven(status: JobStatus) -> Running | None:
    """The bound that the whole looks of an early-stopping job prove; None before the first."""
    if not status.looks:
        return None
    return bound(early_stopping(status.job), status.selection, status.looks)
