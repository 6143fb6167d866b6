"""Logs of answers in the columns of Cohen et al.: one line an image, radii as they are printed.

Cohen et al. print a radius to three significant digits; `vouchsafe evaluate` rounds it down to six
decimals. Logs of attacked images have the classifier's own label, `base`, in the radius's place.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TypeVar

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
HEADER = "\t".join(COLUMNS) + "\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """One image's answer; `predict` is -1 for an abstention, and `base` the label without noise."""

    index: int
    truth: int
    predict: int
    base: int | None
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the label is the true one; an abstention is not."""
        return self.predict == self.truth


@dataclass(frozen=True, slots=True)
class Line(Answer):
    """An answer with its certified radius (l2, [0,1] pixel units), 0 for an abstention."""

    radius: Decimal

    @property
    def certified(self) -> bool:
        """Whether the image has a label, which may be wrong."""
        return self.predict >= 0


T = TypeVar("T", bound=Answer)


def read_log(path: Path) -> list[Line]:
    """The certified images of a log, in its order; there is at least one.

    Raises ValueError, naming file, line, field and value, for a missing column, a field that cannot
    be read, and an image that occurs twice.
    """
    return _read(path, COLUMNS, _line)


def read_answers(path: Path) -> list[Answer]:
    """The answers of a log, with radii or without; raises ValueError as `read_log`."""
    return _read(path, tuple(name for name in COLUMNS if name != "radius"), _answer)


def has_radii(path: Path) -> bool:
    """Whether the log has certified radii."""
    with path.open("rb") as file:
        return b"radius" in file.readline().split()


def _read(path: Path, columns: tuple[str, ...], parse: Callable[[_Fields], T]) -> list[T]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"has no column {missing[0]!r}; a log's are {', '.join(columns)}")
            lines = [parse(_Fields(fields, reader.line_num)) for fields in reader]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is no text in UTF-8") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from error
    if not lines:
        raise ValueError(f"{path}: has no images")
    seen: set[int] = set()
    for line in lines:
        if line.index in seen:
            raise ValueError(f"{path}: idx = {line.index} occurs twice; an image has one line")
        seen.add(line.index)
    return lines


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of one line, whose errors name line, field and value."""

    fields: Mapping[str, str | None]
    number: int

    def whole(self, name: str) -> int:
        try:
            return int(self.fields[name] or "")
        except ValueError:
            raise self.error(name, "must be an integer") from None

    def radius(self) -> Decimal:
        try:
            radius = Decimal(self.fields["radius"] or "")
        except InvalidOperation:
            radius = Decimal("NaN")
        if not radius.is_finite() or radius.is_signed():
            raise self.error("radius", "must be finite and at least 0")
        return radius

    def seconds(self) -> float:
        """A number of seconds, or H:MM:SS as Cohen et al. print it."""
        parts = (self.fields["time"] or "").split(":")
        try:
            return math.fsum(float(part) * 60**i for i, part in enumerate(reversed(parts)))
        except ValueError:
            raise self.error("time", "must be seconds, or H:MM:SS") from None

    def error(self, name: str, limit: str) -> ValueError:
        return ValueError(f"line {self.number}: {name} = {self.fields[name]!r}: {limit}")


def _answer(fields: _Fields) -> Answer:
    truth, predict = fields.whole("label"), fields.whole("predict")
    if predict < -1:
        raise fields.error("predict", "must be a label's index, or -1")
    if fields.whole("correct") != int(predict == truth):
        raise fields.error(
            "correct",
            f"must be {int(predict == truth)} for the label {truth} and predict {predict}",
        )
    base = fields.whole("base") if "base" in fields.fields else None
    return Answer(fields.whole("idx"), truth, predict, base, fields.seconds())


def _line(fields: _Fields) -> Line:
    answer, radius = _answer(fields), fields.radius()
    if answer.predict == -1 and radius != 0:
        raise fields.error("radius", "must be 0 where predict is -1")
    return Line(answer.index, answer.truth, answer.predict, answer.base, answer.seconds, radius)
