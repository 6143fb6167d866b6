"""Issues certificates: the document of a certified answer, its id, and its signature."""

from __future__ import annotations

import hmac
import json
from base64 import urlsafe_b64encode
from dataclasses import asdict
from datetime import UTC, datetime

from models.bundle import ADAPTER, TUNED, Base, Bundle
from models.certificates.evidence import looks_of, recompute, sparse, total_variation
from models.certificates.norms import attack_norms
from models.certificates.rules import Certificate
from service.jobs import NOISE_FORMAT, Job, JobStatus, Mode, State, canonical_json, question
from service.operations.metrics import VERSION
from service.predictions.document import (
    TYPE,
    CertificateDocument,
    Evidence,
    Issuer,
    Model,
    Network,
    Noise,
    Norms,
    Preprocessing,
    ProvenStage,
    Question,
    Result,
    SignedCertificate,
    Subject,
)
from service.predictions.images.reader import PREPROCESSING
from service.signing import SigningKeys, canonical

_ID_BYTES = 16
_MOST_ISSUED = 1_000
"""Certificates of ended jobs that are kept, since callers may request them again and again."""


class Issuing:
    """Issues the certificates of one service, with its noise secret and its signing keys."""

    def __init__(self, secret: bytes, keys: SigningKeys) -> None:
        self._secret, self._keys = secret, keys
        self._issued: dict[str, SignedCertificate] = {}  # by job id, the oldest first

    def issue(self, status: JobStatus, bundle: Bundle) -> SignedCertificate | None:
        """The certificate of a job that has ended, or None where nothing was certified.

        `bundle` is the job's. The same job has the same certificate at every call. Jobs that an
        older release accepted have none.
        """
        job = status.job
        if job.id in self._issued:
            return self._issued[job.id]
        succeeded = status.state is State.SUCCEEDED and status.finished is not None
        if job.mode is not Mode.CERTIFY or not succeeded or not job.file_sha256:
            return None
        asked, evidence = _question(job), _evidence(status)
        proven = recompute(asked.model_dump(), evidence.model_dump(), len(bundle.labels))
        if proven.abstained:
            return None
        result = result_of(proven, bundle.labels, job.shape)
        noise = Noise(
            format=NOISE_FORMAT,
            secret_commitment=self._keys.commitment,
            selection=[0, job.n0 * max(1, len(proven.stages))],
            estimation=[0, sum(status.estimation)],
        )
        document = CertificateDocument(
            type=TYPE,
            id=self._id(status),
            statement=statement(result, asked),
            subject=Subject(
                array_sha256=job.array_sha256,
                shape=list(job.shape),
                file_sha256=job.file_sha256,
                preprocessing=Preprocessing(resolution=job.shape[1], **PREPROCESSING),
            ),
            model=_model(status, bundle),
            question=asked,
            noise=noise,
            evidence=evidence,
            result=result,
            service=Issuer(version=VERSION, issued_at=rfc3339(status.finished or 0.0)),
        )
        jws = self._keys.sign(canonical(document.model_dump()))
        if len(self._issued) == _MOST_ISSUED:
            del self._issued[next(iter(self._issued))]
        self._issued[job.id] = signed = SignedCertificate(document=document, jws=jws)
        return signed

    def _id(self, status: JobStatus) -> str:
        """The same for the same question of the same caller, answered at the same look."""
        named = ["certificate", question(status.job), status.job.owner, sum(status.estimation)]
        digest = hmac.digest(self._secret, canonical_json(named), "sha256")
        return urlsafe_b64encode(digest[:_ID_BYTES]).rstrip(b"=").decode()


def result_of(
    proven: Certificate, labels: tuple[str, ...] | list[str], shape: tuple[int, int, int]
) -> Result:
    """The result section of what was proven, which is no abstention.

    Raises ValueError for an abstention.
    """
    if proven.label is None or proven.radius is None or proven.p_lower is None:
        raise ValueError("the votes prove nothing: the answer is an abstention")
    return Result(
        label=labels[proven.label],
        label_index=proven.label,
        p_lower=proven.p_lower,
        runner_up=proven.runner_up,
        p_upper=proven.p_upper,
        radius=proven.radius,
        stages=[ProvenStage(**asdict(stage)) for stage in proven.stages] or None,
        norms=Norms.model_validate(attack_norms(proven.radius, shape)),
    )


def statement(result: Result, asked: Question) -> str:
    """The sentence that says what is certified; its numbers are written as in the document."""
    sigmas = asked.sigma if isinstance(asked.sigma, list) else [asked.sigma]
    alpha, radius, *of_stages = (
        canonical(number).decode() for number in (asked.alpha, result.radius, *sigmas)
    )
    label = json.dumps(result.label, ensure_ascii=False)
    what = "the classifier" if len(sigmas) == 1 else "the cascade of classifiers"
    return (
        f"With probability at least 1 - {alpha} over the noise, {what} smoothed with sigma "
        f"{', '.join(of_stages)} gives the label {label} to every image at an l2 distance below "
        f"{radius} from the subject, for pixels in [0, 1]; the label is stable, not proven correct."
    )


def _question(job: Job) -> Question:
    return Question(
        sigma=list(job.stages) or job.sigma,
        alpha=job.alpha,
        alpha_shares=job.alpha_shares,
        n0=job.n0,
        n=job.n,
        target_radius=job.target_radius,
        method=job.method,
        looks=None if job.stages else list(job.looks) or None,
    )


def _evidence(status: JobStatus) -> Evidence:
    job, label = status.job, status.selection.index(max(status.selection))
    estimation, passed, looks = status.estimation, None, []
    if job.stages:
        *earlier, estimation = status.votes_by_stage
        passed = [sparse(votes) for votes in earlier]
    elif job.looks:
        looks = looks_of(label, (*status.looks, estimation))
    return Evidence(
        selection_counts=sparse(status.selection),
        estimation_counts=sparse(estimation),
        passed_counts=passed,
        looks=looks,
        total_variation=total_variation(job.shape, job.sigma),
    )


def _model(status: JobStatus, bundle: Bundle) -> Model:
    return Model(
        task=status.job.task,
        labels=list(bundle.labels),
        bundle=status.job.bundle,
        task_digest=bundle.digest,
        denoiser=network(bundle.denoiser),
        adapter=bundle.files.get(ADAPTER),
        classifier=network(bundle.classifier),
        tuned=bundle.files.get(TUNED),
        numerics=dict(status.job.numerics),
    )


def network(base: Base) -> Network:
    """The kind and the files of a base network."""
    return Network(kind=base.kind, files=dict(base.files))


def rfc3339(seconds: float) -> str:
    """The time, in Unix seconds, as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
