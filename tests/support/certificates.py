"""A certificate of a small job, and what it is about."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from service.jobs import Job, JobStatus, State, noise_key
from service.predictions.certificate import Issuing
from service.signing import SigningKeys, canonical
from tests.support.fakes import make_job
from tests.support.serving import DIGEST, KEYS, NUMERICS, PIXELS, PNG, SECRET, TASKS

BUNDLE = TASKS["default"]
SELECTION, ESTIMATION = (1, 0, 9, 0), (20, 5, 175, 0)
PASSED = (60, 70, 40, 30)
"""Estimation votes of a stage at which no label is probable enough."""


def asked(**fields: Any) -> Job:
    """The job of a question about `PNG`."""
    array = PIXELS.transpose(2, 0, 1).tobytes()
    job = replace(
        make_job("a", n0=10, n=200, classes=4, task_digest=BUNDLE.digest, bundle=DIGEST),
        shape=(3, 8, 8),
        pixels=array,
        array_sha256=hashlib.sha256(array).hexdigest(),
        file_sha256=hashlib.sha256(PNG).hexdigest(),
        numerics=NUMERICS,
    )
    job = replace(job, **fields)
    return replace(job, key=noise_key(SECRET, job))


def ended(job: Job | None = None, **fields: Any) -> JobStatus:
    """The status of a succeeded job, certified as `cat` unless `fields` say otherwise."""
    job = asked() if job is None else job
    status = JobStatus(
        replace(job, pixels=b""), State.SUCCEEDED, job.rows, SELECTION, ESTIMATION, 1.0, 1.8e9
    )
    return replace(status, **fields)


def answered(method: str) -> JobStatus:
    """The status of a job that was certified by this method; "early" stopped at a look."""
    if method in ("anytime", "early"):
        looks = (32, 96, 200)
        target = 0.05 if method == "early" else None
        job = asked(method="anytime", looks=looks, target_radius=target)
        first, second = (3, 1, 28, 0), (9, 3, 84, 0)
        if method == "early":
            return ended(job, estimation=second, looks=(first,))
        return ended(job, looks=(first, second))
    if method == "cascade":
        job = asked(method="cascade", sigma=0.5, stages=(0.5, 0.25), looks=(200, 400))
        both = tuple(map(sum, zip(PASSED, ESTIMATION, strict=True)))
        return ended(job, looks=(PASSED,), estimation=both)
    return ended(asked(method=method))


def issued(status: JobStatus | None = None, keys: SigningKeys = KEYS) -> dict[str, Any]:
    """The certificate of a job as a JSON value."""
    signed = Issuing(SECRET, keys).issue(ended() if status is None else status, BUNDLE)
    assert signed is not None
    value: dict[str, Any] = json.loads(signed.model_dump_json())
    return value


def resigned(document: dict[str, Any], keys: SigningKeys = KEYS) -> bytes:
    """The text of a certificate that the service's key signed, whatever the document says."""
    return json.dumps({"document": document, "jws": keys.sign(canonical(document))}).encode()
