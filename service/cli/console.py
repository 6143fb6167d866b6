"""The console that commands share: their settings, and the message with which they end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args

import typer
from pydantic import SecretStr, ValidationError
from rich.console import Console

from service.config import PREFIX, Settings, variable
from service.errors import cut
from service.operations import logs

errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def tell(reason: object) -> None:
    """Print why the process ends, in one line; logged if the log is JSON."""
    if logs.in_json():
        logging.getLogger("vouchsafe").critical("%s", reason)
    else:
        errors.print(f"vouchsafe: {reason}", style="red")


EXAMPLE = "Example: "


def example(words: str) -> str:
    """The last line of a command's help: the command with `words` after it."""
    return f"{EXAMPLE}vouchsafe {words}"


def read_settings(*, log: bool = False) -> Settings:
    """The settings of this process; with `log`, they also configure its log.

    Logs a warning for each unknown VOUCHSAFE_ variable. Exits with 2 and one line for an invalid
    value; raises SecretError as `Settings` does.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        tell(explain(error))
        raise typer.Exit(2) from error
    if log:
        logs.set_up(settings)
    for name, nearest in unknown_variables(os.environ).items():
        meant = f"; did you mean {nearest}?" if nearest else ""
        logging.getLogger("vouchsafe").warning("%s is not a setting%s", name, meant)
    return settings


def unknown_variables(names: Iterable[str]) -> dict[str, str | None]:
    """Unknown VOUCHSAFE_ variables -> the variable of the nearest setting, if any.

    `names` are those of the environment; as in `Settings`, case does not matter.
    """
    known = [field.upper() for field in Settings.model_fields]
    found: dict[str, str | None] = {}
    for name in sorted(names):
        setting = name.upper().removeprefix(PREFIX)
        if name.upper().startswith(PREFIX) and setting not in known:
            nearest = get_close_matches(setting, known, n=1)
            found[name] = variable(nearest[0]) if nearest else None
    return found


def explain(error: ValidationError) -> str:
    """The invalid settings in one line: variable, limit, and value except for secrets."""
    return "; ".join(_explained(each["loc"], each["msg"], each["input"]) for each in error.errors())


def _explained(location: tuple[int | str, ...], message: str, value: object) -> str:
    message = message.removeprefix("Value error, ")
    if not location:  # An error of all settings: its message begins with the field's name.
        field = message.partition(" ")[0]
        return f"{variable(field)}: {message}" if field in Settings.model_fields else message
    field = str(location[0])
    if _is_secret(Settings.model_fields[field].annotation):
        return f"{variable(field)}: {message}"
    shown = cut(json.dumps(value, default=str, ensure_ascii=False))
    return f"{variable(field)}: {message} (it is {shown})"


def _is_secret(annotation: Any) -> bool:
    return annotation is SecretStr or any(map(_is_secret, get_args(annotation)))
