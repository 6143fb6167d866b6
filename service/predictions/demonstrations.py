"""Demonstrations: the fields of POST /demonstrations, their documents, and what these say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, WithJsonSchema, model_validator

from models.demonstrations.limits import Demonstration
from service.jobs import JobStatus, State, canonical_json
from service.predictions.question import ImageRequest, OneSigma, PredictRequest
from service.predictions.results import problem
from service.validation import invalid_field

SMALLEST_EPSILON = 0.004
"""A little more than one gray level of one value, 1/255: the least change of an image."""
LARGEST_EPSILON = 16.0
LARGEST_RESOLUTION = 280
"""Side in pixels at which the 13 pictures of six rows are at most `MOST_RESULT_BYTES` in base64."""

Kind = Annotated[Demonstration, WithJsonSchema({"enum": [kind.value for kind in Demonstration]})]
Status = Literal["queued", "running", "done", "failed", "cancelled"]
Picture = Annotated[str | None, Field(exclude_if=lambda value: value is None)]


class DemonstrationRequest(ImageRequest):
    """What to show about one image."""

    kind: Kind = Field(
        Demonstration.ROWS,
        description="`rows` shows six noise samples (rows), as the networks see them. `attack` "
        "changes the image within `epsilon` by 20 steps of projected gradient descent.",
    )
    sigma: OneSigma = Field(
        0.25,
        description="Standard deviation of the noise, for pixels in [0, 1]; /models has the "
        "largest that each task supports.",
    )
    epsilon: float | None = Field(
        None,
        ge=SMALLEST_EPSILON,
        le=LARGEST_EPSILON,
        description="The most that an attack may change: the l2 norm, for pixels in [0, 1]. "
        "Required for `attack`, refused for `rows`.",
    )

    @model_validator(mode="after")
    def _check_epsilon(self) -> Self:
        is_attack = self.kind is Demonstration.ATTACK
        if is_attack and self.epsilon is None:
            raise invalid_field(
                "epsilon", "epsilon is missing: an attack needs the most that it may change"
            )
        if not is_attack and self.epsilon is not None:
            detail = f"epsilon = {self.epsilon:g}: kind {self.kind} has no epsilon, attack has"
            raise invalid_field("epsilon", detail, self.epsilon)
        return self

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise strength, alone."""
        return (self.sigma,)

    @property
    def rows(self) -> int:
        """Noise rows of the demonstration."""
        return self.kind.rows

    @property
    def charge(self) -> int:
        """Rows that the demonstration costs."""
        return self.kind.charge

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the request, the same for a form and for JSON."""
        fields = self.model_dump(mode="json", exclude={"image"})
        fields |= {"image": hashlib.sha256(self.image).hexdigest()}
        return hashlib.sha256(canonical_json(fields)).hexdigest()


Asked = PredictRequest | DemonstrationRequest
"""A request that becomes a job."""


class Sample(BaseModel):
    """One row: what the denoiser gets, what it returns, and the row's one vote."""

    noisy: str = Field(description="The image with noise (data: address of a PNG), cut to [0, 1].")
    denoised: str = Field(description="The same after the denoiser, as the classifier sees it.")
    label: str = Field(description="The label of this row alone.")


class DemonstrationResponse(BaseModel):
    """A demonstration. It proves nothing: it has no certificate, no radius and no answer."""

    id: str = Field(description="The id, for /demonstrations/{id}.")
    status: Status = Field(description="Pictures are there once it is `done`.")
    kind: Kind = Field(description="The requested kind.")
    task: str = Field(description="The requested task.")
    sigma: float = Field(description="Standard deviation of the noise.")
    resolution: int = Field(description="Side of the pictures, in pixels.")
    rows: int = Field(description="Rows charged.")
    seen: Picture = Field(
        None, description="The image as the networks see it (data: address of a PNG)."
    )
    samples: list[Sample] | None = Field(
        None, description="Of `rows`: six rows.", exclude_if=lambda value: value is None
    )
    epsilon: float | None = Field(
        None,
        description="Of an `attack`: the requested limit.",
        exclude_if=lambda value: value is None,
    )
    image: Picture = Field(
        None, description="Of an `attack`: the attacked image, 8-bit, for POST /predict."
    )
    l2: float | None = Field(
        None,
        description="Its l2 distance from `seen`, at most epsilon.",
        exclude_if=lambda value: value is None,
    )
    steps: int | None = Field(
        None,
        description="Steps of projected gradient descent.",
        exclude_if=lambda value: value is None,
    )
    problem: dict[str, Any] | None = Field(
        None,
        description="Why there are no pictures, once failed or cancelled: a problem document.",
        exclude_if=lambda value: value is None,
    )


def demonstration_response(status: JobStatus, labels: Sequence[str]) -> DemonstrationResponse:
    """The response of a demonstration's job; `labels` are those of its bundle."""
    job = status.job
    pictures: dict[str, Any] = json.loads(status.result) if status.result else {}
    for sample in pictures.get("samples", ()):
        sample["label"] = labels[sample["label"]]
    return DemonstrationResponse(
        id=job.id,
        status="done" if status.state is State.SUCCEEDED else status.state.value,
        kind=Demonstration(job.mode),
        task=job.task,
        sigma=job.sigma,
        resolution=job.shape[1],
        rows=job.charge,
        epsilon=job.epsilon,
        problem=problem(status),
        **pictures,
    )
