"""Documents of predictions over HTTP: one pydantic model each, described for /docs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from models.certificates.abstention import Reason
from service.jobs import State
from service.predictions.document import Norms, SignedCertificate
from service.predictions.question import AnyMethod, AnyMode


class LabelCount(BaseModel):
    """The votes of one label."""

    label: str = Field(description="The label.")
    count: int = Field(description="Noisy rows classified as the label.")


class Stage(BaseModel):
    """A stage of a cascade: its votes, and what they prove."""

    sigma: float = Field(description="Standard deviation of the stage's noise.")
    outcome: Literal["passed", "answered", "abstained"] = Field(
        description="`passed`: no label is probable enough, so the next stage was read. "
        "`answered`: the label is this stage's."
    )
    counts: list[LabelCount] = Field(
        description="Votes of the stage's n estimation rows, most first, without zeros."
    )
    p_lower: float | None = Field(
        description="Lower bound on the stage's label's probability, or null where it was passed."
    )
    p_upper: float | None = Field(
        description="Upper bound on the probability of every label but the answer, where the stage "
        "was passed; else null."
    )
    radius: float = Field(
        description="Within this l2 distance the stage keeps its part of the answer."
    )


class Abstention(BaseModel):
    """The reason why there is no label."""

    reason: Annotated[Reason, WithJsonSchema({"enum": [reason.value for reason in Reason]})] = (
        Field(
            description="`too_few_rows`: more rows would probably do. `too_close`: not even "
            "100,000 with these shares of votes would. `hopeless`: the target radius was given up."
        )
    )
    rows_needed: int | None = Field(
        description="About the fewest rows n that would do, or null; in a cascade, settle the "
        "stage that abstained. Asking with them is a new trial, with its own alpha."
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
    labels: list[str] = Field(
        description="The labels it was chosen among, in the order of `label_index`. A picture that "
        "shows none of them gets one of them too, or an abstention."
    )
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
        "label; 0.0 on abstention, null in the modes predict and purify."
    )
    attack_norms: Norms | None = Field(
        description="The radius in the terms of other changes, or null without a radius."
    )
    abstention: Abstention | None = Field(description="Why there is no label, or null.")
    sigma: float | list[float] = Field(
        description="Standard deviation of the noise; of each stage in a cascade."
    )
    alpha: float = Field(description="Probability that the statement is wrong.")
    n0: int = Field(description="Selection rows, of each stage in a cascade; 0 in predict mode.")
    n: int = Field(
        description="Most estimation rows allowed, of each stage in a cascade; in predict mode, "
        "all rows; in purify mode, the purifications."
    )
    rows_used: int = Field(
        description="Rows that the answer rests on: n0 and the sum of counts, of each stage read."
    )
    p_lower: float | None = Field(
        description="Lower bound on the label's probability under noise; null in the modes predict "
        "and purify."
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
        "less where the answer came early. In a cascade, those of the last stage read."
    )
    stages: list[Stage] | None = Field(
        description="The stages of a cascade that were read, in order; null for other methods."
    )
    method: AnyMethod = Field(description="The statistical procedure.")
    alpha_shares: dict[str, float] = Field(
        description="The parts of alpha by what they are spent on, fixed before any row was drawn."
    )
    looks: list[int] = Field(
        description="Estimation rows at which the answer may come, fixed before any row was drawn; "
        "empty where it comes after all rows."
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


class DenoiserResponse(BaseModel):
    """A denoiser set that new tasks are made with."""

    name: str = Field(description="The value to send as `denoiser` to POST /tasks.")
    words: list[str] | None = Field(
        description="All the words that it was trained on, for labels; null where it takes any."
    )


class ModelsResponse(BaseModel):
    """Every task that callers can request, and what new tasks are made with."""

    models: list[ModelResponse] = Field(description="The tasks.")
    denoisers: list[DenoiserResponse] = Field(description="The sets that POST /tasks adapts.")
