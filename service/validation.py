"""Problems of single fields: each has the field, its value, its limit and what to change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from service.errors import MOST_SHOWN, InvalidField, as_json, cut


def invalid_field(
    field: str, detail: str, value: object = None, limit: float | None = None
) -> InvalidField:
    """The problem of one field; `detail` is a complete sentence."""
    explained: dict[str, Any] = {"field": field, "detail": detail}
    explained |= {} if value is None else {"value": _shown(value)}
    explained |= {} if limit is None else {"limit": limit}
    return InvalidField(detail, errors=[explained])


def invalid_fields(
    errors: Iterable[Mapping[str, Any]], document: type[BaseModel] = BaseModel
) -> InvalidField:
    """The problem of pydantic's `errors` in a `document`: field, value, limit, detail."""
    # Skipped: a default that needs another field, whose own error is reported too.
    real = [error for error in errors if error["type"] != "default_factory_not_called"]
    meant = _meant(real, document)
    explained, lines = [], []
    for error in real:
        if error["type"] == "missing" and _field(error) in meant.values():
            continue  # Sent under an unknown name.
        if error["type"] == "extra_forbidden":
            entry = _unknown(_field(error), meant, document)
            lines.append(entry["detail"])
        else:
            entry = _explained(error)
            was = f" (it is {as_json(error['input'])})" if "value" in entry else ""
            lines.append(f"{entry['field']}: {entry['detail']}{was}")
        explained.append(entry)
    return InvalidField("; ".join(lines), errors=explained)


def _field(error: Mapping[str, Any]) -> str:
    return ".".join(map(str, error["loc"])) or "body"


def _meant(errors: Sequence[Mapping[str, Any]], document: type[BaseModel]) -> dict[str, str]:
    """Unknown fields -> the fields that were probably meant.

    These are the fields of the nearest names, or the only required field that is missing.
    """
    unknown = [_field(error) for error in errors if error["type"] == "extra_forbidden"]
    missing = [_field(error) for error in errors if error["type"] == "missing"]
    near = {name: get_close_matches(name.lower(), document.model_fields, 1) for name in unknown}
    meant = {name: matches[0] for name, matches in near.items() if matches}
    strange = [name for name in unknown if name not in meant]
    lacking = [name for name in missing if name not in meant.values()]
    if len(strange) == len(lacking) == 1:
        meant[strange[0]] = lacking[0]
    return meant


def _unknown(field: str, meant: Mapping[str, str], document: type[BaseModel]) -> dict[str, Any]:
    """The error of an unknown field, without its value, which may be a file."""
    name = cut(field)
    advice = f"the fields are {', '.join(sorted(document.model_fields))}"
    if field in meant:
        advice = f"did you mean {meant[field]}?"
    return {"field": name, "detail": f"there is no field '{name}'; {advice}"}


def _explained(error: Mapping[str, Any]) -> dict[str, Any]:
    context, value = error.get("ctx", {}), error.get("input")
    explained: dict[str, Any] = {"field": cut(_field(error)), "detail": error["msg"]}
    is_file = isinstance(value, bytes) or explained["field"] == "image"
    if error["type"] != "missing" and not is_file:
        explained["value"] = _shown(value)
    limits = [context[name] for name in ("ge", "gt", "le", "lt", "max_length") if name in context]
    return explained | ({"limit": limits[0]} if limits else {})


def _shown(value: object) -> object:
    """The value if its JSON is short, else the beginning of it as a string."""
    if isinstance(value, str):
        return cut(value)
    try:
        is_short = len(json.dumps(value, ensure_ascii=False, allow_nan=False)) <= MOST_SHOWN
    except ValueError:  # JSON has no NaN and no infinity.
        is_short = False
    return value if is_short else as_json(value)
