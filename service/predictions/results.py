"""Turns a job's status into responses: the certificate, the progress or the problem."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

from models.anytime import Anytime, certify_anytime
from models.certificates import Certificate, certify, predict
from service.errors import JobCancelled, Problem
from service.jobs import Job, JobStatus, Mode, State
from service.predictions.schemas import (
    JobResponse,
    LabelCount,
    Method,
    PredictResponse,
    Timing,
)


def total_variation(shape: tuple[int, int, int], sigma: float) -> float:
    """Bound on the total variation distance of a row's drawn noise from the ideal, without torch.

    `shape` is (channels, height, width). A pixel has fewer than 5000 sigma + 10 thresholds, and
    each blurs one word in 2^63; redraws double that. Never below `models.noise.total_variation`.
    """
    return prod(shape) * (5000 * sigma + 10) * 2.0**-62


def certificate(status: JobStatus) -> Certificate:
    """The certificate of a succeeded job's votes; its `method` is that of the noise key."""
    # Without what differs between two equal questions, so that the cache serves all of them.
    job = replace(
        status.job, id="", pixels=b"", created=0.0, owner=None, traceparent=None, setup_rows=0
    )
    return _proven(job, status.selection, (*status.looks, status.estimation))


@lru_cache(maxsize=256)  # The caller's response, the metrics and /jobs/ID need the same one.
def _proven(
    job: Job, selection: tuple[int, ...], looks: tuple[tuple[int, ...], ...]
) -> Certificate:
    blur = total_variation(job.shape, job.sigma)
    match job.method:
        case "binomial":
            return predict(looks[-1], job.alpha, total_variation=blur)
        case "anytime":
            return certify_anytime(early_stopping(job), selection, looks)
        case method:
            return certify(
                selection, looks[-1], job.sigma, job.alpha, method=method, total_variation=blur
            )


def early_stopping(job: Job) -> Anytime:
    """The job's question, for `models.anytime`."""
    return Anytime(
        job.sigma,
        job.alpha,
        job.n0,
        job.n,
        job.target_radius,
        job.looks,
        total_variation(job.shape, job.sigma),
    )


def to_response(status: JobStatus, labels: Sequence[str]) -> PredictResponse:
    """The response of a succeeded job; `labels` are those of its bundle."""
    job, proven = status.job, certificate(status)
    votes = sorted(zip(status.estimation, labels, strict=True), key=lambda vote: -vote[0])
    return PredictResponse(
        id=job.id,
        task=job.task,
        mode=job.mode,
        label=None if proven.label is None else labels[proven.label],
        label_index=proven.label,
        runner_up=None if proven.runner_up is None else labels[proven.runner_up],
        abstained=proven.abstained,
        certified=job.mode is Mode.CERTIFY and not proven.abstained,
        radius=proven.radius,
        sigma=job.sigma,
        alpha=job.alpha,
        n0=job.n0,
        n=job.n,
        rows_used=job.n0 + sum(proven.counts),
        p_lower=proven.p_lower,
        p_upper=proven.p_upper,
        target_radius=proven.target_radius,
        target_reached=proven.target_reached,
        counts=[LabelCount(label=label, count=count) for count, label in votes if count],
        method=Method(proven.method),
        alpha_shares=job.alpha_shares,
        looks=list(job.looks),
        resolution=job.shape[1],
        bundle=job.bundle,
        timing_ms=_timing(status),
    )


def example() -> PredictResponse:
    """A response for /docs, computed like any other: 970 frogs and 30 cats of 1000 rows."""
    labels = ("cat", "frog")
    job = Job(
        id="rB3hYbY0mPz2kQ9xW1cVdA",
        task="default",
        task_digest="",
        bundle=hashlib.sha256(b"example").hexdigest(),
        mode=Mode.CERTIFY,
        sigma=0.25,
        alpha=0.001,
        n0=100,
        n=1000,
        classes=len(labels),
        shape=(3, 32, 32),
        pixels=b"",
        key=b"",
        created=0.0,
        method="two-sided",
    )
    ended = JobStatus(
        job, State.SUCCEEDED, job.rows, (0, 100), (30, 970), started=0.0021, finished=0.8426
    )
    return to_response(ended, labels)


def job_response(status: JobStatus, labels: Sequence[str] | None) -> JobResponse:
    """The job's response; `labels`, those of its bundle, are needed once it has succeeded."""
    job = status.job
    return JobResponse(
        id=job.id,
        state=status.state,
        progress=1.0 if status.state is State.SUCCEEDED else status.rows_done / job.rows,
        rows_done=status.rows_done,
        rows=job.rows,
        task=job.task,
        mode=job.mode,
        created=job.created,
        started=status.started,
        finished=status.finished,
        result=to_response(status, labels) if labels else None,
        problem=problem(status),
    )


def problem(status: JobStatus) -> dict[str, Any] | None:
    """The problem document of a job that failed or was cancelled, else None."""
    if status.state is State.CANCELLED:
        return JobCancelled(
            "The job was cancelled before it was done", job=status.job.id
        ).document()
    if status.state is State.FAILED:
        failed = Problem("The job failed", job=status.job.id).document()
        return failed | (status.problem or {})
    return None


def _timing(status: JobStatus) -> Timing:
    """Times in milliseconds; none is negative, though wall clocks may step."""
    created = status.job.created
    started = max(created, status.started or created)
    finished = max(started, status.finished or started)
    return Timing(
        queue=round(1000 * (started - created), 3),
        inference=round(1000 * (finished - started), 3),
        total=round(1000 * (finished - created), 3),
    )
