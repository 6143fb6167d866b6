"""Certification logs in the columns of Cohen et al.: one line an image, radii as they are printed.

Cohen et al. print a radius to three significant digits; `vouchsafe evaluate` rounds it down to six
decimals.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


@dataclass(frozen=True, slots=True)
class Line:
    """One image's outcome.

    `predict` is -1 and `radius` (l2, [0,1] pixel units, as printed) 0 for an abstention.
    """

    index: int
    truth: int
    predict: int
    radius: Decimal

    @property
    def certified(self) -> bool:
        """Whether the image has a label, which may be wrong."""
        return self.predict >= 0

    @property
    def correct(self) -> bool:
        """Whether the certified label is the true one; an abstention is not."""
        return self.predict == self.truth


def read_log(path: Path) -> list[Line]:
    """The images of a log, in its order; there is at least one.

    Raises ValueError, naming file, line, field and value, for a missing column, a field that cannot
    be read, and an image that occurs twice.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            missing = [name for name in COLUMNS[:5] if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"has no column {missing[0]!r}; a log's are {', '.join(COLUMNS)}")
            lines = [_line(fields, reader.line_num) for fields in reader]
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


def _line(fields: Mapping[str, str | None], number: int) -> Line:
    index, truth, predict, correct = (
        _whole(fields, name, number) for name in ("idx", "label", "predict", "correct")
    )
    radius = _radius(fields["radius"], number)
    if predict < -1:
        raise ValueError(f"line {number}: predict = {predict}: must be a label's index, or -1")
    if predict == -1 and radius != 0:
        raise ValueError(f"line {number}: radius = {radius}: must be 0 where predict is -1")
    if correct != int(predict == truth):
        raise ValueError(
            f"line {number}: correct = {correct}: must be {int(predict == truth)} for the label "
            f"{truth} and the prediction {predict}"
        )
    return Line(index, truth, predict, radius)


def _whole(fields: Mapping[str, str | None], name: str, number: int) -> int:
    try:
        return int(fields[name] or "")
    except ValueError:
        raise ValueError(f"line {number}: {name} = {fields[name]!r}: must be an integer") from None


def _radius(text: str | None, number: int) -> Decimal:
    try:
        radius = Decimal(text or "")
    except InvalidOperation:
        radius = Decimal("NaN")
    if not radius.is_finite() or radius.is_signed():
        raise ValueError(f"line {number}: radius = {text!r}: must be finite and at least 0")
    return radius
