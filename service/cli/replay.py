"""Computes the votes of a certificate again, with the service's secret; loads torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.certificates.evidence import looks_of, sparse
from models.rows import Rows
from models.runtime import RUNTIMES
from models.smoothing import SmoothedModel, load, votes
from service.config import Settings
from service.jobs import Domain, Shard
from service.predictions.document import CertificateDocument
from service.predictions.verification import Refused, array_of, job_of


def replay(
    document: CertificateDocument, image: bytes, bundle: Bundle, secret: bytes, settings: Settings
) -> str:
    """The number of rows that were drawn and labeled again, with the votes of the certificate.

    `image` is the file, `bundle` the task's, `secret` the noise secret. Raises Refused for another
    secret, an array of another image, a machine of other numerics, and other votes.
    """
    job = job_of(document, array_of(document, image), secret)
    model = _model(document, bundle, settings)
    pixels = np.frombuffer(job.pixels, np.uint8).reshape(job.shape)

    def tally(domain: Domain, start: int, stop: int) -> NDArray[np.int64]:
        stage = job.stage_of(Shard(0, domain, start, stop))
        key = job.domain_key(domain, stage)
        return votes(model, Rows(pixels, key, start, stop, job.sigmas[stage]))

    evidence, noise = document.evidence, document.noise
    chosen, drawn = noise.selection[1], noise.estimation[1]
    selection = tally(Domain.SELECTION, chosen - job.n0, chosen)
    ends = [rows for rows, _, _ in evidence.looks] or range(job.n, drawn + 1, job.n)
    rounds = [tally(Domain.ESTIMATION, *span) for span in pairwise((0, *ends))]
    estimation = (np.array(rounds) if job.stages else np.cumsum(rounds, axis=0)).tolist()
    passed = [sparse(votes_of) for votes_of in estimation[:-1]] if job.stages else None
    looks = looks_of(document.result.label_index, estimation) if evidence.looks else []
    for name, stated, found in (
        ("selection_counts", evidence.selection_counts, sparse(selection.tolist())),
        ("estimation_counts", evidence.estimation_counts, sparse(estimation[-1])),
        ("passed_counts", evidence.passed_counts, passed),
        ("looks", evidence.looks, looks),
    ):
        if found != stated:
            raise Refused(f"{name} = {stated}: the replay counts {found}")
    return f"{job.n0 + drawn} rows drawn again got the same votes"


def _model(document: CertificateDocument, bundle: Bundle, settings: Settings) -> SmoothedModel:
    """The networks under the certificate's numerics; raises Refused where these are others here."""
    stated = document.model.numerics
    runtime = str(stated.get("runtime")).partition(" ")[0]
    batch_rows = stated.get("batch_rows")
    if runtime not in RUNTIMES or not isinstance(batch_rows, int):
        raise Refused(f"numerics = {stated}: cannot be set up here")
    model = load(
        bundle,
        batch_rows=batch_rows,
        runtime=RUNTIMES[runtime](),
        models_dir=settings.models_folder,
    )
    if model.digest != document.model.bundle:
        own = model.numerics.described()
        odd = [
            f"{name} {stated.get(name)!r}, here {own[name]!r}"
            for name in own
            if stated.get(name) != own[name]
        ]
        raise Refused(f"numerics: {'; '.join(odd) or 'the task is another one here'}")
    return model
