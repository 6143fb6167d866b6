"""Checks a certificate without trusting its issuer: a list of named checks and their results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from models.adaptation.limits import LABELS
from models.bundle import ADAPTER, TUNED, Bundle, served_digest
from models.certificates.evidence import TOLERANCE, recompute, total_variation
from models.certificates.limits import MOST_ROWS
from service.errors import Problem
from service.jobs import NOISE_FORMAT, Job, Mode, noise_key
from service.predictions.certificate import network, result_of, statement
from service.predictions.document import CertificateDocument
from service.predictions.images.reader import ImageLimits, decode
from service.predictions.question import LARGEST_SIGMA, SMALLEST_SIGMA
from service.signing import (
    COMMITMENTS,
    Signed,
    canonical,
    check_signature,
    commitment,
    read_signed,
    signed_payload,
)

Document = TypeVar("Document", bound=BaseModel)

MOST_RESOLUTION = 4096
"""Largest side of a certified square, in pixels; a larger one is not decoded."""

MOST_BYTES = 2**21
"""Longest text of a certificate: one of 1,000 labels of 128 characters, which it has twice."""

MOST_LOOKS = 64
"""Most looks of a question; the schedule for 100,000 rows has 38."""

MOST_PIXELS = 2**27
"""Most pixels of an image file."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, whether the certificate passed (None: not checked), what was found."""

    name: str
    passed: bool | None
    detail: str


class Refused(ValueError):
    """The certificate fails a check; the message names the field, its value and the limit."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """The checks of one certificate, given as the text of its JSON.

    Each given part adds its checks: `jwks` the signature, `image` (a file's bytes) the subject,
    `bundle` the model.
    """

    text: bytes
    jwks: Mapping[str, Any] | None = None
    image: bytes | None = None
    bundle: Bundle | None = None

    def checks(self) -> tuple[CertificateDocument | None, list[Check]]:
        """The signed document, and every check in order.

        The document is None where the certificate cannot be read; no other check is made then.
        """
        try:
            signed = read_signed(self.text, MOST_BYTES)
            document = parsed(CertificateDocument, signed.payload)
            if document.noise.format != NOISE_FORMAT:
                raise Refused(f"noise.format = {document.noise.format!r}: must be {NOISE_FORMAT}")
        except ValueError as error:
            return None, [Check("format", False, str(error))]
        signature = check_signer(signed, self.jwks)
        done = [
            Check("format", True, document.type),
            check("document", lambda: check_copy(signed)),
            signature,
            Check("statistics", None, "not checked, for the signature is false")
            if signature.passed is False
            else check("statistics", lambda: check_statistics(document)),
            check("model", lambda: self._model(document)),
        ]
        if self.jwks is not None and COMMITMENTS in self.jwks:
            listed = self.jwks[COMMITMENTS]
            done.append(check("commitment", lambda: _check_commitment(document, listed)))
        if (image := self.image) is not None:
            done.append(check("image", lambda: _check_image(document, image)))
        return document, done

    def _model(self, document: CertificateDocument) -> str:
        model = document.model
        digest = served_digest(model.task_digest, model.numerics)
        if model.bundle != digest:
            raise Refused(f"bundle = {model.bundle}: task_digest with numerics is {digest}")
        if (bundle := self.bundle) is None:
            return "bundle is the hash of task_digest and numerics"
        own = {
            "task_digest": bundle.digest,
            "labels": list(bundle.labels),
            "denoiser": network(bundle.denoiser),
            "adapter": bundle.files.get(ADAPTER),
            "classifier": network(bundle.classifier),
            "tuned": bundle.files.get(TUNED),
        }
        for name, value in own.items():
            if getattr(model, name) != value:
                raise Refused(f"{name}: is not that of task {bundle.id}")
        return f"is that of task {bundle.id}"


def check(name: str, holds: Callable[[], str]) -> Check:
    """The check of `holds`, which returns what was found or raises ValueError."""
    try:
        return Check(name, True, holds())
    except (ValueError, ArithmeticError) as error:
        return Check(name, False, str(error))


def check_signer(signed: Signed, jwks: Mapping[str, Any] | None) -> Check:
    """The check of the signature; without a JWKS it names the key, and is not made."""
    if jwks is None:
        kid, _ = signed_payload(signed.jws)
        says = f"not checked: says it is signed by key {kid} (give --jwks)"
        return Check("signature", None, says)
    return check("signature", lambda: f"by key {check_signature(signed.jws, jwks)} of the JWKS")


def check_copy(signed: Signed) -> str:
    """Raises Refused unless the document beside the JWS is the signed one."""
    if canonical(signed.document) != signed.payload:
        raise Refused("document differs from the signed payload")
    return "is the signed payload"


def parsed(kind: type[Document], payload: bytes) -> Document:
    """The document in a payload; raises Refused, which names the field."""
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def check_statistics(document: CertificateDocument) -> str:
    """The statement, once the result and the statement follow from question and evidence alone.

    Raises ValueError where they do not.
    """
    asked, evidence, noise = document.question, document.evidence, document.noise
    for name, rows in (("n0", asked.n0), ("n", asked.n)):
        if not 1 <= rows <= MOST_ROWS:
            raise Refused(f"{name} = {rows}: must be 1 to {MOST_ROWS}")
    sigmas = asked.sigma if isinstance(asked.sigma, list) else [asked.sigma]
    if not (sigmas and min(sigmas) >= SMALLEST_SIGMA and max(sigmas) <= LARGEST_SIGMA):
        raise Refused(f"sigma = {asked.sigma}: must be {SMALLEST_SIGMA} to {LARGEST_SIGMA}")
    for name, number, most in (
        ("labels", len(document.model.labels), LABELS[1]),
        ("looks", len(asked.looks or ()), MOST_LOOKS),
    ):
        if number > most:
            raise Refused(f"{name} has {number} entries: must be at most {most}")
    passed = evidence.passed_counts or []
    votes = (evidence.estimation_counts, *passed)
    drawn = {
        "selection": (noise.selection, asked.n0 * len(votes)),
        "estimation": (noise.estimation, sum(sum(counts.values()) for counts in votes)),
    }
    for name, (stated, rows) in drawn.items():
        if stated != [0, rows]:
            raise Refused(f"{name} = {stated}: must be [0, {rows}], the rows that voted")
    shape = shape_of(document)
    least = total_variation(shape, sigmas[0])
    if not math.isclose(evidence.total_variation, least, rel_tol=1e-12):
        raise Refused(f"total_variation = {evidence.total_variation}: must be {least}")
    proven = recompute(asked.model_dump(), evidence.model_dump(), len(document.model.labels))
    claimed = document.result.model_dump()
    _check_equal("", claimed, result_of(proven, document.model.labels, shape).model_dump())
    if document.statement != (meant := statement(document.result, asked)):
        raise Refused(f"statement: must be {meant}")
    return document.statement


def job_of(document: CertificateDocument, pixels: bytes, secret: bytes) -> Job:
    """The job that asks the certificate's question again, with its noise key.

    `pixels` are the certified array's bytes. Raises Refused for another secret than the one that
    the certificate commits to.
    """
    if (own := commitment(secret)) != document.noise.secret_commitment:
        raise Refused(
            f"secret_commitment = {document.noise.secret_commitment}: this noise secret has {own}"
        )
    asked = document.question
    stages = tuple(asked.sigma) if isinstance(asked.sigma, list) else ()
    looks = [asked.n * stage for stage in range(1, len(stages) + 1)] or asked.looks
    job = Job(
        id=document.id,
        task=document.model.task,
        task_digest=document.model.task_digest,
        bundle=document.model.bundle,
        mode=Mode.CERTIFY,
        sigma=asked.sigma if isinstance(asked.sigma, float) else stages[0],
        alpha=asked.alpha,
        n0=asked.n0,
        n=asked.n,
        classes=len(document.model.labels),
        shape=shape_of(document),
        pixels=pixels,
        key=b"",
        created=0.0,
        method=asked.method,
        target_radius=asked.target_radius,
        looks=tuple(looks or ()),
        stages=stages,
    )
    return replace(job, key=noise_key(secret, job))


def shape_of(document: CertificateDocument) -> tuple[int, int, int]:
    """Channels, height and width of the certified array.

    Raises Refused unless they are 3, R and R for the stated resolution R.
    """
    channels, height, width = document.subject.shape
    resolution = document.subject.preprocessing.resolution
    if (channels, height, width) != (3, resolution, resolution):
        raise Refused(f"shape = {document.subject.shape}: must be [3, {resolution}, {resolution}]")
    if not 1 <= resolution <= MOST_RESOLUTION:
        raise Refused(f"resolution = {resolution}: must be 1 to {MOST_RESOLUTION}")
    return channels, height, width


def array_of(document: CertificateDocument, image: bytes) -> bytes:
    """The bytes of the certified array, made from an image file.

    Raises Refused for a file that makes another array, or none.
    """
    _, resolution, _ = shape_of(document)
    try:
        array = decode(image, resolution, ImageLimits(len(image), MOST_PIXELS)).tobytes()
    except Problem as problem:
        raise Refused(f"the file cannot be read: {problem}") from problem
    if (found := hashlib.sha256(array).hexdigest()) != document.subject.array_sha256:
        raise Refused(f"array_sha256 = {document.subject.array_sha256}: this image has {found}")
    return array


def _check_commitment(document: CertificateDocument, listed: Sequence[str]) -> str:
    if (own := document.noise.secret_commitment) not in listed:
        raise Refused(f"secret_commitment = {own}: is not among those of the JWKS")
    return f"to one of {len(listed)} noise secrets that the JWKS publishes"


def _check_image(document: CertificateDocument, image: bytes) -> str:
    array_of(document, image)
    if hashlib.sha256(image).hexdigest() != document.subject.file_sha256:
        return "makes the certified array, but is not the file that was sent"
    return "is the file that was sent, and makes the certified array"


def _check_equal(name: str, claimed: Any, found: Any) -> None:
    """Raise Refused where values differ, numbers by more than TOLERANCE allows."""
    if isinstance(claimed, dict) and isinstance(found, dict):
        if claimed.keys() != found.keys():
            raise Refused(f"{name} has {', '.join(claimed)}: must have {', '.join(found)}")
        for key in found:
            _check_equal(key, claimed[key], found[key])
    elif isinstance(claimed, list) and isinstance(found, list) and len(claimed) == len(found):
        for each, proven in zip(claimed, found, strict=True):
            _check_equal(name, each, proven)
    elif isinstance(claimed, float) and isinstance(found, float):
        if not abs(claimed - found) <= TOLERANCE * max(1.0, abs(found)):
            raise Refused(f"{name} = {claimed}: the evidence proves {found}")
    elif claimed != found:
        raise Refused(f"{name} = {claimed!r}: the evidence proves {found!r}")
