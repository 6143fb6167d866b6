"""Turns a job's status into responses: the certificate, the progress or the problem."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from models.bundle import Base, Bundle
from models.certificates.abstention import Reason, rows_needed
from models.certificates.anytime import Anytime, certify_anytime
from models.certificates.cascade import Cascade, certify_cascade, is_passed
from models.certificates.evidence import total_variation
from models.certificates.norms import attack_norms
from models.certificates.rules import Certificate, bound_votes, certify, predict
from service.errors import JobCancelled, Problem
from service.jobs import Job, JobStatus, Mode, State
from service.predictions.certificate import Issuing
from service.predictions.document import Norms, SignedCertificate
from service.predictions.question import Method
from service.predictions.schemas import (
    Abstention,
    JobResponse,
    LabelCount,
    PredictResponse,
    Stage,
    Timing,
)
from service.signing import SigningKeys


def certificate(status: JobStatus) -> Certificate:
    """The certificate of a succeeded job's votes; its `method` is that of the noise key."""
    # Without what differs between two equal questions, so that the cache serves all of them.
    job = replace(
        status.job, id="", pixels=b"", created=0.0, owner=None, traceparent=None, setup_rows=0
    )
    votes = status.votes_by_stage if job.stages else (*status.looks, status.estimation)
    return _proven(job, status.selection, votes)


@lru_cache(maxsize=256)  # The caller's response, the metrics and /jobs/ID need the same one.
def _proven(
    job: Job, selection: tuple[int, ...], votes: tuple[tuple[int, ...], ...]
) -> Certificate:
    blur = total_variation(job.shape, job.sigma)
    match job.method:
        case "majority":
            return _majority(job, votes[-1])
        case "binomial":
            return predict(votes[-1], job.alpha, total_variation=blur)
        case "anytime":
            return certify_anytime(early_stopping(job), selection, votes)
        case "cascade":
            return certify_cascade(cascade(job), selection, votes)
        case method:
            return certify(
                selection, votes[-1], job.sigma, job.alpha, method=method, total_variation=blur
            )


def _majority(job: Job, votes: tuple[int, ...]) -> Certificate:
    """The label of most purifications, which proves nothing."""
    return Certificate(
        label=votes.index(max(votes)),
        runner_up=None,
        abstained=False,
        radius=None,
        p_lower=None,
        p_upper=None,
        counts=votes,
        n0=0,
        n=job.n,
        alpha=job.alpha,
        sigma=None,
        method=job.method,
    )


def early_stopping(job: Job) -> Anytime:
    """The job's question, for `models.certificates.anytime`."""
    return Anytime(
        job.sigma,
        job.alpha,
        job.n0,
        job.n,
        job.target_radius,
        job.looks,
        total_variation(job.shape, job.sigma),
    )


def cascade(job: Job) -> Cascade:
    """The job's question, for `models.certificates.cascade`."""
    blur = total_variation(job.shape, job.sigma)
    return Cascade(job.stages, job.alpha, job.n0, job.n, blur)


def to_response(
    status: JobStatus, labels: Sequence[str], signed: SignedCertificate | None = None
) -> PredictResponse:
    """The response of a succeeded job; `labels` are those of its bundle, `signed` its document."""
    job, proven = status.job, certificate(status)
    return PredictResponse(
        id=job.id,
        task=job.task,
        mode=job.mode,
        label=None if proven.label is None else labels[proven.label],
        label_index=proven.label,
        labels=list(labels),
        runner_up=None if proven.runner_up is None else labels[proven.runner_up],
        abstained=proven.abstained,
        certified=job.mode is Mode.CERTIFY and not proven.abstained,
        radius=proven.radius,
        attack_norms=_attack_norms(job, proven),
        abstention=_abstention(status, proven),
        sigma=list(job.stages) or job.sigma,
        alpha=job.alpha,
        n0=job.n0,
        n=job.n,
        rows_used=job.n0 * max(1, len(proven.stages)) + sum(status.estimation),
        p_lower=proven.p_lower,
        p_upper=proven.p_upper,
        target_radius=proven.target_radius,
        target_reached=proven.target_reached,
        counts=label_counts(proven.counts, labels),
        stages=_stages(status, proven, labels) if job.stages else None,
        method=Method(proven.method),
        alpha_shares=job.alpha_shares,
        looks=list(job.looks),
        resolution=job.shape[1],
        bundle=job.bundle,
        timing_ms=_timing(status),
        certificate=signed,
    )


def label_counts(votes: Sequence[int], labels: Sequence[str]) -> list[LabelCount]:
    """The votes by label, most first, without zeros."""
    ranked = sorted(zip(votes, labels, strict=True), key=lambda vote: -vote[0])
    return [LabelCount(label=label, count=count) for count, label in ranked if count]


def _stages(status: JobStatus, proven: Certificate, labels: Sequence[str]) -> list[Stage]:
    last: Literal["abstained", "answered"] = "abstained" if proven.abstained else "answered"
    return [
        Stage(
            sigma=bounds.sigma,
            outcome=last if bounds is proven.stages[-1] else "passed",
            counts=label_counts(votes, labels),
            p_lower=bounds.p_lower,
            p_upper=bounds.p_upper,
            radius=bounds.radius,
        )
        for bounds, votes in zip(proven.stages, status.votes_by_stage, strict=True)
    ]


def _attack_norms(job: Job, proven: Certificate) -> Norms | None:
    if not proven.radius:
        return None
    return Norms.model_validate(attack_norms(proven.radius, job.shape))


def _abstention(status: JobStatus, proven: Certificate) -> Abstention | None:
    if not proven.abstained:
        return None
    job, votes = status.job, proven.counts
    if job.target_radius is not None and sum(votes) < job.n:
        return Abstention(reason=Reason.HOPELESS, rows_needed=None)
    sigma = proven.sigma or job.sigma
    blur = total_variation(job.shape, job.sigma)

    def proves(more: tuple[int, ...]) -> bool:
        if job.mode is Mode.PREDICT:
            with suppress(ValueError):  # PREDICT refuses n whose noise alone spends alpha.
                return not predict(more, job.alpha, total_variation=blur).abstained
            return False
        shares = job.alpha_shares
        if job.stages:
            shares = {"label": min(shares.values())}
        return bound_votes(label, more, sigma, shares, blur).radius > 0.0

    selection = votes if job.mode is Mode.PREDICT else status.selection
    label = selection.index(max(selection))
    needed = rows_needed(votes, label, proves)
    if needed is None and len(proven.stages) < len(job.stages):
        question, most = cascade(job), max(votes)  # The largest count alone decides.
        needed = rows_needed(
            (sum(votes) - most, most),
            0,
            lambda more: is_passed(replace(question, n=sum(more)), (more[1], 0)),
        )
    reason = Reason.TOO_CLOSE if needed is None else Reason.TOO_FEW_ROWS
    return Abstention(reason=reason, rows_needed=needed)


def example() -> PredictResponse:
    """A response for /docs, computed like any other: 970 frogs and 30 cats of 1000 rows."""
    bundle = Bundle(
        id="example",
        labels=("cat", "frog"),
        template="This is a photo of a {}.",
        prompt="",
        k=1.8,
        resolution=32,
        largest_sigma=1.0,
        denoiser=Base("none"),
        classifier=Base("open-clip"),
        licence="",
        files={},
    )
    job = Job(
        id="rB3hYbY0mPz2kQ9xW1cVdA",
        task="default",
        task_digest=bundle.digest,
        bundle=bundle.served_digest({}),
        mode=Mode.CERTIFY,
        sigma=0.25,
        alpha=0.001,
        n0=100,
        n=1000,
        classes=len(bundle.labels),
        shape=(3, 32, 32),
        pixels=b"",
        key=b"",
        created=0.0,
        method="two-sided",
        array_sha256=hashlib.sha256(b"array").hexdigest(),
        file_sha256=hashlib.sha256(b"file").hexdigest(),
    )
    ended = JobStatus(
        job, State.SUCCEEDED, job.rows, (0, 100), (30, 970), started=0.0021, finished=0.8426
    )
    secret = hashlib.sha256(b"example").digest()
    signed = Issuing(secret, SigningKeys(secret, secret)).issue(ended, bundle)
    return to_response(ended, bundle.labels, signed)


def job_response(status: JobStatus, result: PredictResponse | None) -> JobResponse:
    """The job's response; `result` is that of a job that has succeeded."""
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
        result=result,
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
