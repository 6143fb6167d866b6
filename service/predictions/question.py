"""The question of a caller: the fields of POST /predict, described for /docs."""

from __future__ import annotations

import binascii
import hashlib
from base64 import b64decode
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import (
    CoreSchema,
    no_info_wrap_validator_function,
    plain_serializer_function_ser_schema,
)

from models.certificates.limits import MAX_STAGES, MIN_STAGES, MOST_ROWS
from service.jobs import Mode, canonical_json

SMALLEST_SIGMA = 0.02
LARGEST_SIGMA = 4.0
DEFAULT_ROWS = {Mode.CERTIFY: 1000, Mode.PREDICT: 100, Mode.PURIFY: 8}
MOST_PURIFICATIONS = 16
PURIFICATION_ROWS = 150
"""Rows that a purification is charged as, one a step: on IF-II's schedule the default has 143."""
PURIFICATION_SIGMA = 0.121
"""Default noise of a purification: 70 of DDPM's 1,000 steps (method.md 7)."""
DEFAULT_SELECTION_ROWS = 100
TARGET_ROWS = 10_000
TARGET_SELECTION_ROWS = 16
"""Default rows with a target radius: most questions need few of them."""


class Method(StrEnum):
    """The statistical procedures."""

    TWO_SIDED = "two-sided"
    ANYTIME = "anytime"
    COHEN = "cohen"
    CASCADE = "cascade"
    BINOMIAL = "binomial"
    MAJORITY = "majority"


ONLY_METHOD = {Mode.PREDICT: Method.BINOMIAL, Mode.PURIFY: Method.MAJORITY}
"""The method of modes that have a single one."""


def _from_base64(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise PydanticCustomError("base64", "Input should be base64 without line breaks") from None


def _default_method(earlier: dict[str, Any]) -> Method:
    if (mode := earlier.get("mode")) in ONLY_METHOD:
        return ONLY_METHOD[mode]
    if isinstance(earlier.get("sigma"), tuple):
        return Method.CASCADE
    return Method.TWO_SIDED if earlier.get("target_radius") is None else Method.ANYTIME


def _default_selection_rows(earlier: dict[str, Any]) -> int:
    has_target = earlier.get("target_radius") is not None
    return TARGET_SELECTION_ROWS if has_target else DEFAULT_SELECTION_ROWS


def _default_sigma(earlier: dict[str, Any]) -> float:
    return PURIFICATION_SIGMA if earlier.get("mode") is Mode.PURIFY else 0.25


def _default_rows(earlier: dict[str, Any]) -> int:
    if earlier.get("target_radius") is not None:
        return TARGET_ROWS
    return DEFAULT_ROWS[earlier.get("mode", Mode.CERTIFY)]


OneSigma = Annotated[float, Field(ge=SMALLEST_SIGMA, le=LARGEST_SIGMA)]


def _each_sigma(_: object, handler: GetCoreSchemaHandler) -> CoreSchema:
    """The schema of one sigma or of a list; errors are those of the wrong element."""

    def validate(value: Any, one: Callable[[Any], float]) -> float | tuple[float, ...]:
        return tuple(map(one, value)) if isinstance(value, list | tuple) else one(value)

    as_it_is = plain_serializer_function_ser_schema(lambda value: value)
    one = handler.generate_schema(OneSigma)
    return no_info_wrap_validator_function(validate, one, serialization=as_it_is)


_SIGMA = {"type": "number", "minimum": SMALLEST_SIGMA, "maximum": LARGEST_SIGMA}
_SIGMAS = {"type": "array", "items": _SIGMA, "minItems": MIN_STAGES, "maxItems": MAX_STAGES}
Sigma = Annotated[
    float | tuple[float, ...],
    GetPydanticSchema(_each_sigma),
    WithJsonSchema({"anyOf": [_SIGMA, _SIGMAS]}),
]
AnyMode = Annotated[Mode, WithJsonSchema({"enum": [mode.value for mode in Mode]})]
AnyMethod = Annotated[Method, WithJsonSchema({"enum": [method.value for method in Method]})]
Encoded = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


class ImageRequest(BaseModel):
    """The fields of every request about one image, as a form or as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    image: Encoded = Field(description="A JPEG, PNG or WebP: a form's file, or base64 in JSON.")
    task: str = Field(
        "default",
        max_length=200,
        description="Which labels to choose from: a task's id, or its name where no other has it.",
    )


class PredictRequest(ImageRequest):
    """One question about one image."""

    mode: AnyMode = Field(
        Mode.CERTIFY,
        description="`certify` answers with a radius; `predict` is quicker and has none. `purify` "
        "lets a diffusion model clean the image first, which certifies nothing.",
    )
    sigma: Sigma = Field(
        default_factory=_default_sigma,
        description="Standard deviation of the noise, for pixels in [0, 1]; 0.25 by default, 0.121 "
        "for `purify`. /models has the largest that each task supports. Two to four descending "
        "values ask the method `cascade`: the first at which a label is probable enough answers.",
    )
    target_radius: float | None = Field(
        None,
        gt=0.0,
        description="The radius that suffices: the answer comes once it is proven or hopeless.",
    )
    method: AnyMethod = Field(
        default_factory=_default_method,
        description="`two-sided` bounds the runner-up too; `anytime` proves a bound at every look; "
        "`cohen` is the published rule; `cascade` reads several sigma. `anytime` by default with a "
        "target radius, `cascade` with several sigma.",
    )
    alpha: float = Field(
        0.001, gt=0.0, lt=0.5, description="Probability that the answer's statement is wrong."
    )
    n0: int = Field(
        default_factory=_default_selection_rows,
        ge=1,
        le=MOST_ROWS,
        description="Rows that choose the label, of each stage in a cascade; 100 by default, 16 "
        "with a target radius. Unused by `predict`.",
    )
    n: int = Field(
        default_factory=_default_rows,
        ge=1,
        le=MOST_ROWS,
        description="Most rows that bound the label's probability, of each stage in a cascade; "
        "1000 by default, 100 for `predict`, 10000 with a target radius. Purifications for "
        "`purify`: 8 by default, at most 16.",
    )

    @property
    def selection_rows(self) -> int:
        """n0, or 0 in the modes that have no selection."""
        return self.n0 if self.mode is Mode.CERTIFY else 0

    @property
    def rows(self) -> int:
        """Most noise rows of the whole question."""
        return (self.selection_rows + self.n) * len(self.sigmas)

    @property
    def charge(self) -> int:
        """Rows that the question costs."""
        return self.rows * (PURIFICATION_ROWS if self.mode is Mode.PURIFY else 1)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise strength of each stage; only a cascade has several."""
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma,)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the question, the same for a form and for JSON."""
        fields = self.model_dump(mode="json", exclude={"image", "n0"})
        fields |= {"n0": self.selection_rows, "image": hashlib.sha256(self.image).hexdigest()}
        return hashlib.sha256(canonical_json(fields)).hexdigest()
