"""Looks at questions in rounds: each round's votes lead to the next round or to the end."""

from __future__ import annotations

import asyncio
import logging

from models.certificates.anytime import Decision, Running, at_look, bound
from models.certificates.cascade import is_passed
from service.background import sleep_or_stop
from service.engine.connection import UNREACHABLE
from service.engine.protocol import Engine
from service.jobs import JobStatus
from service.operations.logs import about
from service.predictions.results import cascade, early_stopping

logger = logging.getLogger("vouchsafe")

_RETRY_SECONDS = 1.0
"""Seconds until the next look after an error."""


async def keep_looking(engine: Engine, stop: asyncio.Event) -> None:
    """Extend or finish every job whose look is due, until `stop`.

    Any number of processes may do so at once. A process that is killed between two rounds leaves
    the job due, and another one goes on. A job whose look fails stays due, and the others go on.
    """
    while not stop.is_set():
        try:
            looked = [await _look_safely(engine, status) for status in await engine.due()]
        except UNREACHABLE:  # Requests and probes report it.
            looked = [False]
        except Exception:
            logger.exception("the jobs whose look is due cannot be read; retrying")
            looked = [False]
        if not all(looked):
            await sleep_or_stop(stop, _RETRY_SECONDS)


async def _look_safely(engine: Engine, status: JobStatus) -> bool:
    """Whether the look succeeded; an error is logged, unless the engine is unreachable."""
    try:
        await look(engine, status)
    except UNREACHABLE:
        raise
    except Exception:
        logger.exception("a look at a job failed; retrying", extra=about([status.job]))
        return False
    return True


async def look(engine: Engine, status: JobStatus) -> None:
    """Extend a due job by its next round, or finish it."""
    looks = status.job.looks
    if _goes_on(status):
        await engine.extend(status.job.id, looks[len(status.looks) + 1])
    else:
        await engine.finish(status.job.id, sum(status.estimation))


def _goes_on(status: JobStatus) -> bool:
    """Whether the look that is due leads to another round."""
    job = status.job
    if job.stages:
        is_last = len(status.looks) + 1 == len(job.stages)
        return not is_last and is_passed(cascade(job), status.votes_by_stage[-1])
    votes = (*status.looks, status.estimation)
    return at_look(early_stopping(job), status.selection, votes) is Decision.CONTINUE


async def finish_early(engine: Engine, job_id: str) -> JobStatus | None:
    """Finish an early-stopping job without a target radius at its last whole look.

    Returns the last status of a job that has ended, now or meanwhile. None for a job that goes on:
    it has another method, a target radius, or no whole look yet.
    """
    while (status := await engine.status(job_id)) is not None and not status.state.ended:
        job = status.job
        looks = (*status.looks, status.estimation) if status.due else status.looks
        if job.method != "anytime" or job.target_radius is not None or not looks:
            return None
        await engine.finish(job_id, sum(looks[-1]))  # Refused where another look came before.
    return status


def proven(status: JobStatus) -> Running | None:
    """The bound that the whole looks of an early-stopping job prove; None before the first.

    None for a cascade, whose passed stages bound no label.
    """
    if not status.looks or status.job.stages:
        return None
    return bound(early_stopping(status.job), status.selection, status.looks)
