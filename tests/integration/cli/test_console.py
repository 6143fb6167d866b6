"""service/cli/console.py: what a command says of the environment it is started in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.cli.console import explain, unknown_variables
from service.config import Settings
from tests.support.paths import ROOT

START = "from service.cli.main import main; main()"


def vouchsafe(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process with no other variables than these."""
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", START, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("VOUCHSAFE_LEASE_SECOND", "VOUCHSAFE_LEASE_SECONDS"),
        ("VOUCHSAFE_DATADIR", "VOUCHSAFE_DATA_DIR"),
        ("vouchsafe_api_key", "VOUCHSAFE_API_KEYS"),
        ("VOUCHSAFE_ZEBRA", None),
    ],
)
def test_unknown_variables_have_a_nearest(name: str, nearest: str | None) -> None:
    """The warning of an unknown variable names the setting that looks like it, if there is one."""
    others = ("PATH", "VOUCHSAFE_DATA_DIR", "vouchsafe_shard_rows", "MY_VOUCHSAFE_THING")
    assert unknown_variables([name, *others]) == {name: nearest}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lease_seconds", "-1", "VOUCHSAFE_LEASE_SECONDS: Input should be greater than 0 "),
        (
            "default_wait_seconds",
            "900",
            "VOUCHSAFE_DEFAULT_WAIT_SECONDS: Input should be less than or equal to 6",
        ),
        ("log_level", "loud", "VOUCHSAFE_LOG_LEVEL: Input should be 'debug', 'info', 'warning' "),
    ],
)
def test_a_refused_setting_is_told_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    """One line has the variable, its limit and its value."""
    monkeypatch.setenv(f"VOUCHSAFE_{name.upper()}", value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    line = explain(refused.value)
    assert line.startswith(told)
    assert line.endswith(f'(it is "{value}")')
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("redis_url", "http://:hunter2@host"), ("api_keys", "ann:hunter2,:hunter2")],
)
def test_a_refused_secret_is_told_without_its_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The variable of a secret is named, and no part of the secret."""
    monkeypatch.setenv(f"VOUCHSAFE_{name.upper()}", value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    line = explain(refused.value)
    assert line.startswith(f"VOUCHSAFE_{name.upper()}: ")
    assert "hunter2" not in line


def test_long_values_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills the line is shown by its beginning."""
    monkeypatch.setenv("VOUCHSAFE_SHARD_ROWS", "x" * 5000)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert len(explain(refused.value)) < 250


def test_each_command_ends_with_2_for_a_bad_setting(tmp_path: Path) -> None:
    """Before anything else a command says in one line which settings it cannot take."""
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    commands = (
        ["serve"],
        ["worker"],
        ["predict", "nothing.png"],
        ["adapt", "--labels", "labels.txt"],
        ["models", "list"],
    )
    for command in commands:
        bad = {"VOUCHSAFE_SHARD_ROWS": "0", "VOUCHSAFE_LEASE_SECONDS": "soon"}
        ended = vouchsafe(*command, folder=tmp_path, **bad)
        assert ended.returncode == 2, command
        assert ended.stderr == (
            "vouchsafe: VOUCHSAFE_SHARD_ROWS: Input should be greater than or equal to 1 "
            '(it is "0"); VOUCHSAFE_LEASE_SECONDS: Input should be a valid number, unable to '
            'parse string as a number (it is "soon")\n'
        ), command
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def test_an_unknown_variable_is_warned_of(tmp_path: Path) -> None:
    """A command goes on, and says once which variable it did not use."""
    ended = vouchsafe("models", "list", folder=tmp_path, VOUCHSAFE_MODEL_DIR="/srv/models")
    assert ended.returncode == 0
    line = "VOUCHSAFE_MODEL_DIR is not a setting; did you mean VOUCHSAFE_MODELS_DIR?\n"
    assert ended.stderr == line


def test_a_workers_warning_is_in_its_log(tmp_path: Path) -> None:
    """Where a process has a log, the warning is a record of it."""
    variables = {"VOUCHSAFE_LOG_FORMAT": "json", "VOUCHSAFE_REDIS": "redis://127.0.0.1"}
    ended = vouchsafe("worker", folder=tmp_path, **variables)
    assert ended.returncode == 2
    first = ended.stderr.splitlines()[0]
    assert '"level": "WARNING"' in first
    assert "VOUCHSAFE_REDIS is not a setting; did you mean VOUCHSAFE_REDIS_URL?" in first
