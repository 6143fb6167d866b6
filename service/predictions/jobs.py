"""The jobs of admitted requests: their rows, their look schedules, and the keys of their noise."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.certificates.anytime import look_schedule
from models.certificates.evidence import total_variation
from service.jobs import Job, noise_key
from service.predictions.admission import Admission
from service.predictions.demonstrations import Asked, DemonstrationRequest
from service.predictions.question import Method, PredictRequest


def to_job(
    request: Asked,
    pixels: NDArray[np.uint8],
    bundle: Bundle,
    admission: Admission,
    secret: bytes,
    owner: str | None,
    traceparent: str | None,
) -> Job:
    """The job of an admitted request about `pixels` (3,H,W).

    A question's noise key is made with the `secret`. A demonstration's is random, because its rows
    are shown: no certificate may rest on rows that its caller has seen.
    """
    array = pixels.tobytes()
    channels, height, width = pixels.shape
    shared: dict[str, Any] = {
        "id": secrets.token_urlsafe(16),
        "task": request.task,
        "task_digest": bundle.digest,
        "bundle": admission.digest,
        "classes": len(bundle.labels),
        "shape": (channels, height, width),
        "pixels": array,
        "created": time.time(),
        "owner": owner,
        "traceparent": traceparent,
        "setup_rows": admission.setup_rows,
        "array_sha256": hashlib.sha256(array).hexdigest(),
        "file_sha256": hashlib.sha256(request.image).hexdigest(),
        "numerics": admission.numerics,
    }
    if isinstance(request, DemonstrationRequest):
        return Job(
            **shared,
            mode=request.kind,
            sigma=request.sigma,
            alpha=0.0,
            n0=0,
            n=request.rows,
            key=secrets.token_bytes(32),
            epsilon=request.epsilon,
        )
    job = Job(
        **shared,
        mode=request.mode,
        sigma=request.sigmas[0],
        alpha=request.alpha,
        n0=request.selection_rows,
        n=request.n,
        key=b"",
        method=request.method.value,
        target_radius=request.target_radius,
        looks=_looks(request, (channels, height, width)),
        stages=request.sigmas if request.method is Method.CASCADE else (),
    )
    return replace(job, key=noise_key(secret, job))


def _looks(question: PredictRequest, shape: tuple[int, int, int]) -> tuple[int, ...]:
    """The estimation rows after which a question may end; none where all are drawn at once."""
    if question.method is Method.ANYTIME:
        sigma = question.sigmas[0]
        blur = total_variation(shape, sigma)
        return look_schedule(question.n, sigma, question.alpha, question.target_radius, blur)
    if question.method is Method.CASCADE:
        return tuple(question.n * stage for stage in range(1, len(question.sigmas) + 1))
    return ()
