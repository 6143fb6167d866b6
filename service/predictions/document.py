"""Certificate documents: one pydantic model a section, described for /docs and for verifiers.

docs/certificate.md is the reference of the format.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.certificates.limits import MAX_STAGES

TYPE: Final = "urn:vouchsafe:certificate:1"
"""The format's name; another format has another number."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Votes = Annotated[dict[str, int], Field(description="Nonzero votes by label index.")]
Range = Annotated[list[int], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of a certificate: unknown fields, and values of other types, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Preprocessing(Section):
    """The way from the uploaded file to the certified array."""

    resize: str = Field(description="Resampling of the shorter side to the resolution.")
    crop: str = Field(description="The part that is kept.")
    resolution: int = Field(description="Side of the certified square, in pixels.")
    color: str = Field(description="Color space and depth of the certified array.")


class Subject(Section):
    """The image: the certified array, and the file that it was made from."""

    array_sha256: Sha256 = Field(description="SHA-256 of the certified array's uint8 bytes.")
    shape: Annotated[list[int], Field(min_length=3, max_length=3)] = Field(
        description="Channels, height and width of the array, in the order of its bytes."
    )
    file_sha256: Sha256 = Field(description="SHA-256 of the uploaded file.")
    preprocessing: Preprocessing = Field(description="How the array was made from the file.")


class Network(Section):
    """A base network: its kind, and the SHA-256 of each of its files."""

    kind: str = Field(description="The kind of network.")
    files: dict[str, Sha256] = Field(description="SHA-256 by file name.")


class Model(Section):
    """The classifier under noise, in so far as labels depend on it."""

    task: str = Field(description="The requested task.")
    labels: list[str] = Field(description="The labels, in the order of `label_index`.")
    bundle: Sha256 = Field(description="SHA-256 of `task_digest` with `numerics`.")
    task_digest: Sha256 = Field(description="SHA-256 of the task's manifest.")
    denoiser: Network = Field(description="The denoiser's base network.")
    adapter: Sha256 | None = Field(description="SHA-256 of the denoiser's adapter, or null.")
    classifier: Network = Field(description="The classifier's base network.")
    tuned: Sha256 | None = Field(description="SHA-256 of the tuned classifier, or null.")
    numerics: dict[str, Any] = Field(description="Device, precision and batch shape.")


class Question(Section):
    """The question, fixed before any row was drawn."""

    sigma: float | Annotated[list[float], Field(max_length=MAX_STAGES)] = Field(
        description="Standard deviation of the noise; those of all stages in a cascade."
    )
    alpha: float = Field(description="Probability that the statement is wrong.")
    alpha_shares: dict[str, float] = Field(description="How the bounds divide alpha.")
    n0: int = Field(description="Selection rows, of each stage in a cascade.")
    n: int = Field(description="Most estimation rows, of each stage in a cascade.")
    target_radius: float | None = Field(description="The radius to prove, or null.")
    method: str = Field(description="The statistical procedure.")
    looks: list[int] | None = Field(description="Rows at which sampling may stop, or null.")


class Noise(Section):
    """The noise rows, and the commitment to the secret that they were drawn from."""

    format: str = Field(description="The way rows are keyed and drawn.")
    secret_commitment: Sha256 = Field(description="The same in every certificate of a service.")
    selection: Range = Field(description="Selection rows that were drawn: first, end.")
    estimation: Range = Field(description="Estimation rows that were drawn: first, end.")


class Evidence(Section):
    """The votes; in a cascade those of the stage that answers, and of the passed ones."""

    selection_counts: Votes
    estimation_counts: Votes
    passed_counts: Annotated[list[Votes], Field(max_length=MAX_STAGES)] | None = Field(
        None,
        description="Estimation votes of each passed stage; only in a cascade.",
        exclude_if=lambda votes: votes is None,
    )
    looks: list[Annotated[list[int], Field(min_length=3, max_length=3)]] = Field(
        description="Each look's rows, votes of the label, and largest other votes."
    )
    total_variation: float = Field(
        description="Bound, for a row, on the distance of the drawn noise from the ideal; in a "
        "cascade at the largest sigma."
    )


class Norms(Section):
    """Changes that the radius covers, in gray levels (255 are the whole range of a value)."""

    l2_gray_levels: float = Field(description="The l2 norm of any change; l1 has the same bound.")
    linf_gray_levels: float = Field(description="The largest change of a value, if all may change.")
    brightness_gray_levels: float = Field(description="One shift of all values.")
    patch_gray_levels: dict[str, float] = Field(
        description="The largest change of a value within a square patch, by its width in pixels."
    )


class ProvenStage(Section):
    """What a stage of a cascade proves."""

    sigma: float = Field(description="Standard deviation of the stage's noise.")
    p_lower: float | None = Field(description="Lower bound on the label, where it answers.")
    p_upper: float | None = Field(description="Upper bound on other labels, where it was passed.")
    radius: float = Field(description="The distance within which the stage decides the same.")


class Result(Section):
    """What the evidence proves about the question."""

    label: str = Field(description="The label.")
    label_index: int = Field(description="The label's index, from 0.")
    p_lower: float = Field(description="Lower bound on the label's probability under noise.")
    runner_up: int | None = Field(description="Index of the other label with most votes.")
    p_upper: float | None = Field(description="Upper bound on the runner-up's probability.")
    radius: float = Field(description="The certified l2 radius, for pixels in [0, 1].")
    stages: list[ProvenStage] | None = Field(
        None,
        description="The stages that were read, in order; only in a cascade.",
        exclude_if=lambda stages: stages is None,
    )
    norms: Norms = Field(description="The same radius in the terms of other changes.")


class Issuer(Section):
    """The service that issued the certificate."""

    version: str = Field(description="The service's release.")
    issued_at: str = Field(
        pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$",
        description="When the last row was counted (RFC 3339, UTC).",
    )


class CertificateDocument(Section):
    """Everything that a certificate states."""

    type: Literal["urn:vouchsafe:certificate:1"] = Field(description="The format.")
    id: str = Field(
        pattern="^[A-Za-z0-9_-]{22}$", description="The certificate's id, for /certificates/{id}."
    )
    statement: str = Field(description="What is certified, in one sentence.")
    subject: Subject
    model: Model
    question: Question
    noise: Noise
    evidence: Evidence
    result: Result
    service: Issuer


class SignedCertificate(Section):
    """A certificate: the document, and a signature over its canonical bytes (RFC 8785)."""

    document: CertificateDocument
    jws: str = Field(description="A compact JWS (RFC 7515) whose payload is the document.")
