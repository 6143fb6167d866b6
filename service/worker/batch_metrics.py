"""Metrics of a device batch, and the log fields that name its jobs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from service.operations import metrics
from service.operations.logs import about
from service.worker.batching import Slice
from service.worker.model import Model

logger = logging.getLogger("vouchsafe.worker")


def measure(model: Model, task: str | None, batch: Sequence[Slice], seconds: float) -> None:
    """Count a batch that took `seconds`; `task` is None for a deleted task, which has no series."""
    rows = sum(part.rows for part in batch)
    if task is not None:
        metrics.ROWS.labels(task=task).inc(rows)
        metrics.BATCHES.labels(task=task).inc()
    metrics.BATCH_ROWS.observe(rows)
    metrics.PADDING_ROWS.inc(model.padding(rows))
    metrics.BATCH_SECONDS.observe(seconds)
    metrics.BATCH_JOBS.observe(len({part.lease.job.id for part in batch}))
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%d rows in %.4f s", rows, seconds, extra=about_batch(batch))


def about_batch(batch: Sequence[Slice]) -> dict[str, Any]:
    """The `extra` of a log record about a batch's jobs."""
    return about(part.lease.job for part in batch)
