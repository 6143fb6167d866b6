"""The log of a process on standard error: plain lines, or one JSON object a line."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from service.config import Settings
from service.jobs import Job
from service.operations.tracing import trace_id

IDS = ("request_id", "job_id", "task_id", "trace_id")
"""Ids in the `extra` of a record; several of one kind are a list."""


class TextFormatter(logging.Formatter):
    """One line: level, logger and message, then the record's ids that the message lacks."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without the traceback."""
        ids = ((name, _listed(getattr(record, name, ""))) for name in IDS)
        behind = (f" {name}={value}" for name, value in ids if value not in record.message)
        return super().formatMessage(record) + "".join(behind)


def json_formatter() -> logging.Formatter:
    """A formatter of `time` (RFC 3339, UTC), `level`, `logger`, `message` and the `extra`.

    The traceback of an exception is one string, `exception`.
    """
    return JsonFormatter(
        ("levelname", "name", "message"),
        rename_fields={"levelname": "level", "name": "logger", "exc_info": "exception"},
        timestamp="time",
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # Uvicorn's, with terminal codes.
    )


FORMATTERS = {"text": TextFormatter, "json": json_formatter}


def set_up(settings: Settings) -> None:
    """Log this process and its libraries in the settings' format and level.

    Libraries log from `warning` on, or from `info` on if the level is `debug`.
    """
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    libraries = logging.INFO if level < logging.INFO else max(level, logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATTERS[settings.log_format]())
    logging.basicConfig(level=libraries, handlers=[handler], force=True)
    logging.getLogger("vouchsafe").setLevel(level)
    logging.captureWarnings(settings.log_format == "json")


def in_json() -> bool:
    """Whether this process logs in JSON."""
    return any(isinstance(each.formatter, JsonFormatter) for each in logging.root.handlers)


def about(jobs: Iterable[Job]) -> dict[str, Any]:
    """The `extra` of a record about these jobs: their ids, and those of their tasks and traces."""
    found = list({job.id: job for job in jobs}.values())
    traces = (trace_id(job.traceparent) for job in found)
    return naming(
        job_id=[job.id for job in found],
        task_id=[job.task for job in found],
        trace_id=[trace for trace in traces if trace],
    )


def naming(**named: str | Sequence[str] | None) -> dict[str, Any]:
    """The `extra` of a record with these ids: a string, a list, or nothing for each kind."""
    distinct = {
        kind: [given] if isinstance(given, str) else list(dict.fromkeys(given or ()))
        for kind, given in named.items()
    }
    return {kind: all_ if len(all_) > 1 else all_[0] for kind, all_ in distinct.items() if all_}


def _listed(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ",".join(value)
