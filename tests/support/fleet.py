"""Queries of a fleet's worker processes for tests."""

from __future__ import annotations

from typing import Any

from benchmarks.fleet import counted_exactly
from models.smoothing import SmoothedModel
from service.engine.redis.engine import RedisEngine
from service.jobs import JobStatus


async def last_status(engine: Any, job_id: str) -> JobStatus:
    """The job's last status."""
    *_, last = [status async for status in engine.watch(job_id)]
    assert isinstance(last, JobStatus)
    return last


async def rows_done(engine: RedisEngine, job_id: str) -> int:
    status = await engine.status(job_id)
    assert status is not None
    return status.rows_done


def assert_counted_exactly(status: JobStatus, model: SmoothedModel) -> None:
    """The job's votes are those of each of its rows, counted once."""
    assert counted_exactly(status, model), status
