"""The command line: what it prints, and how it ends."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli.console import unknown_variables
from service.cli.main import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_help_lists_what_works_and_nothing_else() -> None:
    """Each command is listed once its feature works, and not before."""
    text = runner.invoke(app, ["--help"]).output
    commands = "serve predict evaluate tables plots audit concepts bench adapt models worker verify"
    assert all(command in text for command in commands.split())
    assert "│ jobs" not in text


def test_version_is_the_installed_one() -> None:
    """`--version` prints the release and ends well, without a command."""
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"vouchsafe {version('vouchsafe-predictions')}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    """`--show-completion` prints a script for the shell that asks the command for its words."""
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    result = runner.invoke(app, ["--show-completion"], prog_name="vouchsafe")
    assert result.exit_code == 0
    assert f"_VOUCHSAFE_COMPLETE=complete_{shell}" in result.stdout


def test_completion_knows_the_commands() -> None:
    """A half-written command is completed, and the variable that asks for it is no setting."""
    asked = {
        "_VOUCHSAFE_COMPLETE": "complete_bash",
        "COMP_WORDS": "vouchsafe pr",
        "COMP_CWORD": "1",
    }
    result = runner.invoke(app, [], prog_name="vouchsafe", env=asked)
    assert result.stdout.split() == ["predict"]
    assert unknown_variables(asked) == {}
