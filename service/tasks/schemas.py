"""Documents of tasks over HTTP: one pydantic model each."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from models.adaptation.limits import EPOCHS, LABELS, NAME_LENGTH, SHOTS, STEPS, PlanError
from models.adaptation.plan import Plan
from service.validation import invalid_field

STATES = Literal["queued", "running", "ready", "failed", "cancelled"]
_SET_NAME_LENGTH = 64
_LABELS_NAMED = 3


def _checked_name(name: str) -> str:
    words = unicodedata.normalize("NFC", name).strip()
    if not words:
        raise PydanticCustomError("string_too_short", "Input should not be blank")
    if any(unicodedata.category(character).startswith("C") for character in words):
        raise PydanticCustomError("control_character", "Input holds a control character")
    return words


def _label(given: object) -> str | tuple[str, str]:
    if isinstance(given, str):
        return given
    if isinstance(given, dict) and given.keys() == {"label", "prompt"}:
        label, prompt = given["label"], given["prompt"]
        if isinstance(label, str) and isinstance(prompt, str):
            return label, prompt
    raise PydanticCustomError(
        "label", "Input should be a string, or an object of two strings, label and prompt"
    )


Name = Annotated[str, Field(max_length=NAME_LENGTH), AfterValidator(_checked_name)]
_STRING = {"type": "string"}
Label = Annotated[
    str | tuple[str, str],
    PlainValidator(_label),
    WithJsonSchema(
        {
            "anyOf": [
                _STRING,
                {
                    "type": "object",
                    "properties": {"label": _STRING, "prompt": _STRING},
                    "required": ["label", "prompt"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
"""A label, or a label and its prompt."""


class TaskRequest(BaseModel):
    """A request to make a task from its labels; the denoiser set has defaults for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name | None = Field(None, description="A name for people; it does not affect the task.")
    labels: Annotated[list[Label], FailFast()] = Field(
        description=f"The labels to choose from, {LABELS[0]} to {LABELS[1]} of them; "
        "with a `prompt` where other words stand for the label in the template."
    )
    template: str | None = Field(
        None, description="A sentence with {} where a label goes, as in `This is a photo of a {}.`"
    )
    shots: int | None = Field(
        None, description=f"Reference pictures of each label, {SHOTS[0]} to {SHOTS[1]}."
    )
    steps: int | None = Field(
        None,
        description=f"Steps of the denoiser's personalization, at most {STEPS[1]}; 0 leaves it.",
    )
    epochs: int | None = Field(
        None, description=f"Epochs of the classifier's fine-tuning, at most {EPOCHS[1]}; 0: none."
    )
    seed: int = Field(0, description="Another seed is another task.")
    denoiser: str = Field(
        "nano",
        max_length=_SET_NAME_LENGTH,
        description="The denoiser set to adapt, or a name that "
        "`vouchsafe models add` registered with a cascade.",
    )
    classifier: str | None = Field(
        None,
        max_length=_SET_NAME_LENGTH,
        description="The classifier set to adapt, or a name that "
        "`vouchsafe models add` registered.",
    )
    allow_unknown_labels: bool = Field(
        False, description="Accept labels that the set was not trained on, at any quality."
    )

    def plan(self, models_dir: Path | None = None) -> Plan:
        """The plan of the task.

        Raises InvalidField for a field outside its limits, and for networks that are incomplete in
        `models_dir`.
        """
        settings = self.model_dump(exclude={"name", "labels"})
        try:
            return Plan.checked(self.labels, **settings, models_dir=models_dir)
        except PlanError as error:
            raise invalid_field(error.field, str(error), error.value, error.limit) from error

    def name_of(self, plan: Plan) -> str:
        """The name, or the plan's first labels by default."""
        if self.name is not None:
            return self.name
        more = len(plan.labels) - _LABELS_NAMED
        named = ", ".join(plan.labels[:_LABELS_NAMED]) + (f" and {more} more" if more > 0 else "")
        return named[:NAME_LENGTH]


class TaskResponse(BaseModel):
    """A task, whether or not it is ready."""

    id: str = Field(description="The task's id, to be sent as `task` once it is ready.")
    name: str = Field(description="The task's name, for people.")
    state: STATES = Field(description="The task's state.")
    stage: str | None = Field(
        description="While it runs: synthesizing, personalizing, finetuning or evaluating."
    )
    progress: float = Field(description="Share of the work that is done, from 0 to 1.")
    eta_seconds: float | None = Field(description="Estimated seconds until it is ready, or null.")
    losses: dict[str, float] = Field(description="The last loss of each stage that has one.")
    figures: dict[str, Any] = Field(
        description="What was measured of the finished task on its own references, the images it "
        "was made from: no estimate of accuracy on photographs."
    )
    problem: dict[str, Any] | None = Field(
        description="Why there will be no task, once failed: a problem document."
    )
    labels: list[str] = Field(description="The labels, in the order of `label_index`.")
    prompts: dict[str, str] = Field(
        description="The words for a label in the template, if other than the label itself."
    )
    template: str = Field(description="The sentence that labels are put in.")
    settings: dict[str, Any] = Field(
        description="denoiser, classifier, shots, steps, epochs and seed, as far as known."
    )
    created: float = Field(description="When it was requested, in Unix seconds.")
    started: float | None = Field(description="When its job first ran, or null.")
    finished: float | None = Field(description="When it ended, or null.")
    references: list[str] = Field(
        description="Addresses of some of the pictures it is made from, one of each label first."
    )


class TasksResponse(BaseModel):
    """Tasks that were made from labels, the newest first, and the address of the next page."""

    tasks: list[TaskResponse] = Field(description="The tasks.")
    next: str | None = Field(description="The address of the tasks before these, or null.")
