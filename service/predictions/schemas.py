"""Documents of predictions over HTTP: one pydantic model each, described for /docs."""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from models.certificates.abstention import Reason
from service.jobs import Mode, State, canonical_json
from service.predictions.document import Norms, SignedCertificate

MOST_ROWS = 100_000
SMALLEST_SIGMA = 0.02
LARGEST_SIGMA = 4.0
DEFAULT_ROWS = {Mode.CERTIFY: 1000, Mode.PREDICT: 100}
DEFAULT_SELECTION_ROWS = 100
TARGET_ROWS = 10_000
TARGET_SELECTION_ROWS = 16
"""Default rows with a target radius: most questions need few of them."""


class Method(StrEnum):
    """The statistical procedures."""

    TWO_SIDED = "two-sided"
    ANYTIME = "anytime"
    COHEN = "cohen"
    BINOMIAL = "binomial"


def _from_base64(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise PydanticCustomError("base64", "Input should be base64 without line breaks") from None


def _default_method(earlier: dict[str, Any]) -> Method:
    if earlier.get("mode") is Mode.PREDICT:
        return Method.BINOMIAL
    return Method.TWO_SIDED if earlier.get("target_radius") is None else Method.ANYTIME


def _default_selection_rows(earlier: dict[str, Any]) -> int:
    has_target = earlier.get("target_radius") is not None
    return TARGET_SELECTION_ROWS if has_target else DEFAULT_SELECTION_ROWS


def _default_rows(earlier: dict[str, Any]) -> int:
    if earlier.get("target_radius") is not None:
        return TARGET_ROWS
    return DEFAULT_ROWS[earlier.get("mode", Mode.CERTIFY)]


AnyMode = Annotated[Mode, WithJsonSchema({"enum": [mode.value for mode in Mode]})]
AnyMethod = Annotated[Method, WithJsonSchema({"enum": [method.value for method in Method]})]
Encoded = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


class PredictRequest(BaseModel):
    """One question about one image, as a form or as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    image: Encoded = Field(description="A JPEG, PNG or WebP: a form's file, or base64 in JSON.")
    task: str = Field(
        "default",
        max_length=200,
        description="Which labels to choose from: a task's id, or its name where no other has it.",
    )
    mode: AnyMode = Field(
        Mode.CERTIFY,
        description="`certify` answers with a radius; `predict` is quicker and has none.",
    )
    target_radius: float | None = Field(
        None,
        gt=0.0,
        description="The radius that suffices: the answer comes once it is proven or hopeless.",
    )
    method: AnyMethod = Field(
        default_factory=_default_method,
        description="`two-sided` bounds the runner-up too; `anytime` proves a bound at every look; "
        "`cohen` is the published rule. `anytime` by default with a target radius.",
    )
    sigma: float = Field(
        0.25,
        ge=SMALLEST_SIGMA,
        le=LARGEST_SIGMA,
        description="Standard deviation of the noise, for pixels in [0, 1]; /models has the "
        "largest that each task supports.",
    )
    alpha: float = Field(
        0.001, gt=0.0, lt=0.5, description="Probability that the answer's statement is wrong."
    )
    n0: int = Field(
        default_factory=_default_selection_rows,
        ge=1,
        le=MOST_ROWS,
        description="Rows that choose the label; 100 by default, 16 with a target radius. Unused "
        "by `predict`.",
    )
    n: int = Field(
        default_factory=_default_rows,
        ge=1,
        le=MOST_ROWS,
        description="Most rows that bound the label's probability; 1000 by default, 100 for "
        "`predict`, 10000 with a target radius.",
    )

    @property
    def selection_rows(self) -> int:
        """n0, or 0 in predict mode, which has no selection."""
        return self.n0 if self.mode is Mode.CERTIFY else 0

    @property
    def rows(self) -> int:
        """Noise rows of the whole question."""
        return self.selection_rows + self.n

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the question, the same for a form and for JSON."""
        fields = self.model_dump(mode="json", exclude={"image", "n0"})
        fields |= {"n0": self.selection_rows, "image": hashlib.sha256(self.image).hexdigest()}
        return hashlib.sha256(canonical_json(fields)).hexdigest()


class LabelCount(BaseModel):
    """The votes of one label."""

    label: str = Field(description="The label.")
    count: int = Field(description="Noisy rows classified as the label.")


class Abstention(BaseModel):
    """The reason why there is no label."""

    reason: Annotated[Reason, WithJsonSchema({"enum": [reason.value for reason in Reason]})] = (
        Field(
            description="`too_few_rows`: more rows would probably do. `too_close`: not even "
            "100,000 with these shares of votes would settle the selected label. `hopeless`: the "
            "target radius was given up."
        )
    )
    rows_needed: int | None = Field(
        description="About the fewest rows n that would do, or null. Asking with them is a new "
        "trial, with its own alpha."
    )


class Timing(BaseModel):
    """Times of a job, in milliseconds."""

    queue: float = Field(description="From the question's acceptance to its first row's start.")
    inference: float = Field(description="From the first row's start to the last row's vote.")
    total: float = Field(description="From the question's acceptance to the last row's vote.")


class PredictResponse(BaseModel):
    """An answer: certified means stable, not correct."""

    id: str = Field(description="The job's id, for /jobs/{id}.")
    task: str = Field(description="The requested task.")
    mode: AnyMode = Field(description="The requested mode.")
    label: str | None = Field(description="The label, or null on abstention.")
    label_index: int | None = Field(description="The label's index, from 0, or null.")
    runner_up: str | None = Field(
        description="The other label with most votes, or null where the method does not bound it."
    )
    abstained: bool = Field(description="Whether the votes were too close to answer.")
    certified: bool = Field(
        description="Whether the radius is a guarantee: the label is stable within it. It may "
        "still be the wrong label."
    )
    radius: float | None = Field(
        description="No change of the pixels (in [0, 1]) shorter than this in l2 norm changes the "
        "label; 0.0 on abstention, null in predict mode."
    )
    attack_norms: Norms | None = Field(
        description="The radius in the terms of other changes, or null without a radius."
    )
    abstention: Abstention | None = Field(description="Why there is no label, or null.")
    sigma: float = Field(description="Standard deviation of the noise.")
    alpha: float = Field(description="Probability that the statement is wrong.")
    n0: int = Field(description="Selection rows; 0 in predict mode.")
    n: int = Field(description="Most estimation rows allowed; in predict mode, all rows.")
    rows_used: int = Field(description="Rows that the answer rests on: n0, and the sum of counts.")
    p_lower: float | None = Field(
        description="Lower bound on the label's probability under noise; null in predict mode."
    )
    p_upper: float | None = Field(
        description="Upper bound on every other label's probability, or null where none is proven."
    )
    target_radius: float | None = Field(description="The requested radius, or null.")
    target_reached: bool | None = Field(
        description="Whether the radius is at least the requested one; null without one."
    )
    counts: list[LabelCount] = Field(
        description="Votes of the estimation rows, most first, without zeros; they sum to n, or to "
        "less where the answer came early."
    )
    method: AnyMethod = Field(description="The statistical procedure.")
    alpha_shares: dict[str, float] = Field(
        description="The parts of alpha by what they are spent on, fixed before any row was drawn."
    )
    looks: list[int] = Field(
        description="Estimation rows at which an early-stopping answer may end, fixed before any "
        "row was drawn; empty for other methods."
    )
    resolution: int = Field(description="Side of the square, in pixels, that the answer is about.")
    bundle: str = Field(description="SHA-256 of the task's artifact with the numerics used.")
    timing_ms: Timing = Field(description="Times, in milliseconds.")
    certificate: SignedCertificate | None = Field(
        None,
        description="The certificate to take away, where `certified` is true; else absent.",
        exclude_if=lambda certificate: certificate is None,
    )


class JobResponse(BaseModel):
    """A job, whether or not it has ended."""

    id: str = Field(description="The job's id.")
    state: Annotated[State, WithJsonSchema({"enum": [state.value for state in State]})] = Field(
        description="The job's state."
    )
    progress: float = Field(description="Share of the rows that are counted, from 0 to 1.")
    rows_done: int = Field(description="Rows counted so far.")
    rows: int = Field(description="Rows the job needs.")
    task: str = Field(description="The requested task.")
    mode: AnyMode = Field(description="The requested mode.")
    created: float = Field(description="When the job was accepted, in Unix seconds.")
    started: float | None = Field(description="When its first row started, or null.")
    finished: float | None = Field(description="When it ended, or null.")
    result: PredictResponse | None = Field(description="The answer, once succeeded.")
    problem: dict[str, Any] | None = Field(
        description="Why there is no answer, once failed or cancelled: a problem document."
    )


class ModelResponse(BaseModel):
    """A task that callers can request."""

    task: str = Field(description="The value to send as `task`.")
    name: str = Field(description="The name that its maker chose; may be empty.")
    id: str = Field(description="The id of the task's artifact.")
    labels: list[str] = Field(description="The labels, in the order of `label_index`.")
    resolution: int = Field(description="Side of the certified square, in pixels.")
    denoiser: str = Field(description="The kind of denoiser.")
    classifier: str = Field(description="The kind of classifier.")
    licence: str = Field(description="The license of the weights.")
    k: float = Field(description="Scale of the denoiser's noise-level conditioning.")
    largest_sigma: float = Field(description="The strongest noise that the task supports.")
    bundle: str | None = Field(description="The digest served now, or null without a worker.")
    ready: bool = Field(description="Whether a live worker serves the task.")


class ModelsResponse(BaseModel):
    """Every task that callers can request."""

    models: list[ModelResponse] = Field(description="The tasks.")
