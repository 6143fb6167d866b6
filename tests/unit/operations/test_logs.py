"""service/operations/logs.py: what a line of the log looks like in either format."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import uvicorn

from service.cli.console import tell
from service.config import Settings
from service.operations import logs
from tests.support.fakes import make_job
from tests.support.http import TRACE, VALID

log = logging.getLogger("vouchsafe.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The log of the tests themselves is what it was; a server of an earlier one quiets none."""
    loggers = [logging.getLogger(name) for name in ("", "vouchsafe", "uvicorn", "uvicorn.error")]
    handlers, levels = list(loggers[0].handlers), [each.level for each in loggers]
    for theirs in loggers[2:]:
        theirs.setLevel(logging.NOTSET)
    yield
    logging.captureWarnings(False)
    loggers[0].handlers[:] = handlers
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was logged, an object a line."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_json_line_tells_when_who_and_what(capsys: pytest.CaptureFixture[str]) -> None:
    """Time in RFC 3339 and UTC, level, logger and message; the ids are fields."""
    logs.set_up(Settings(log_format="json"))
    before = datetime.now(UTC)
    log.info("a %s\nof two lines", "message", extra=logs.about([replace(JOB, traceparent=VALID)]))
    (record,) = records(capsys)
    assert before <= datetime.fromisoformat(record.pop("time")) <= datetime.now(UTC)
    assert record == {
        "level": "INFO",
        "logger": "vouchsafe.test",
        "message": "a message\nof two lines",
        "job_id": "a",
        "task_id": "default",
        "trace_id": TRACE,
    }


def test_times_say_that_they_are_utc(capsys: pytest.CaptureFixture[str]) -> None:
    """RFC 3339 wants an offset."""
    logs.set_up(Settings(log_format="json"))
    log.info("")
    assert records(capsys)[0]["time"].endswith("+00:00")


def test_exceptions_are_within_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback is a field, and no line of its own."""
    logs.set_up(Settings(log_format="json"))
    try:
        raise ValueError("that was it")
    except ValueError:
        log.exception("it failed")
    (record,) = records(capsys)
    assert record["message"] == "it failed"
    assert record["exception"].startswith("Traceback")
    assert record["exception"].endswith("ValueError: that was it")


def test_libraries_log_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """Uvicorn's records, those of other libraries and Python's warnings are such lines too."""
    logs.set_up(Settings(log_format="json"))
    uvicorn.Config("", log_config=None, access_log=False)
    coloured = {"color_message": "\x1b[1mInvalid\x1b[0m"}
    logging.getLogger("uvicorn.error").warning("Invalid", extra=coloured)
    logging.getLogger("redis").warning("a %s", "word")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", DeprecationWarning, stacklevel=1)
    invalid, word, warning = records(capsys)
    assert (invalid["logger"], invalid["message"]) == ("uvicorn.error", "Invalid")
    assert "color_message" not in invalid
    assert word["message"] == "a word"
    assert "old ways" in warning["message"]


def test_text_has_the_ids_behind_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    """A line to read, with each id in it once to search for; a traceback comes after."""
    logs.set_up(Settings())
    several = logs.about([JOB, replace(JOB, id="b"), JOB])
    log.info("a %s", "message", extra=several)
    log.info("task %s is there", "cats", extra=logs.naming(task_id="cats"))
    log.error("failed", exc_info=ValueError("that was it"))
    logging.getLogger("uvicorn.error").warning("Invalid")
    assert capsys.readouterr().err.splitlines() == [
        "INFO vouchsafe.test a message job_id=a,b task_id=default",
        "INFO vouchsafe.test task cats is there",
        "ERROR vouchsafe.test failed",
        "ValueError: that was it",
        "WARNING uvicorn.error Invalid",
    ]


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ("debug", ["ours debug", "ours info", "theirs info", "theirs warning", "theirs error"]),
        ("info", ["ours info", "theirs warning", "theirs error"]),
        ("warning", ["theirs warning", "theirs error"]),
        ("error", ["theirs error"]),
    ],
)
def test_libraries_are_quieter_than_the_service(
    capsys: pytest.CaptureFixture[str], level: str, told: list[str]
) -> None:
    """Libraries log from `warning` on, and from `info` on only where the service logs `debug`."""
    logs.set_up(Settings.model_validate({"log_level": level, "log_format": "json"}))
    log.debug("ours debug")
    log.info("ours info")
    for name, severity in (("httpx", "debug"), ("uvicorn.error", "info"), ("httpx", "warning")):
        getattr(logging.getLogger(name), severity)("theirs %s", severity)
    logging.getLogger().error("theirs error")  # Some libraries log on the root logger.
    assert [record["message"] for record in records(capsys)] == told


def test_why_a_process_ends_is_told_in_the_logs_format(capsys: pytest.CaptureFixture[str]) -> None:
    """The last words of a command are a record too, where the log is in JSON."""
    tell("no Redis")
    assert capsys.readouterr().err == "vouchsafe: no Redis\n"
    logs.set_up(Settings(log_format="json"))
    tell("no Redis")
    (record,) = records(capsys)
    assert (record["level"], record["message"]) == ("CRITICAL", "no Redis")


JOB = make_job("a")
