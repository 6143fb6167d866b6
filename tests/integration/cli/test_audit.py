"""The command `audit`: its sentences, its document, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.cli.main import app
from tests.support.logs import write_log

runner = CliRunner()
REUSED = [0, 0, *[4, 8, 12, 4, 8, 4] * 4, 800]
HONEST = [0, 0, 1, 2, 3, 5, 4, 6, 7, 2, 1, 1, 3, 800, 4, 9, 13, 2]


def audit(log: Path, *arguments: str, code: int) -> Result:
    settings = ("--n", "10000", "--sigma", "0.25")
    result = runner.invoke(app, ["audit", str(log), *settings, *arguments])
    assert result.exit_code == code, result.output
    return result


def test_reused_noise_ends_with_one(tmp_path: Path) -> None:
    """The finding, its p-value, the effective n and both lines of the table are printed."""
    text = audit(write_log(tmp_path / "log.tsv", REUSED, 10_000, 0.25), code=1).output
    assert "of 24 readable tallies that miss 1 to 23 votes, 24 miss a multiple of 4" in text
    assert "No image has 9997, 9998, 9999 votes." in text
    assert "Effective n: 2500 of 10000." in text
    assert "as printed, n = 10000" in text
    assert "with n = 2500" in text


def test_an_honest_log_ends_with_zero(tmp_path: Path) -> None:
    """One line of the table, and no effective n."""
    text = audit(write_log(tmp_path / "log.tsv", HONEST, 10_000, 0.25), code=0).output
    assert "18 images: 18 certified, 2 with all 10000 votes." in text
    assert "Nothing found: p = 1 over" in text
    assert "Effective" not in text
    none = audit(write_log(tmp_path / "none.tsv", [1, 2, 800], 10_000, 0.25), code=0).output
    assert "No image has all 10000 votes, so check n and sigma." in none
    few = audit(write_log(tmp_path / "few.tsv", [0, 4], 10_000, 0.25), code=0).output
    assert "too few near-full tallies" in few


def test_the_document(tmp_path: Path) -> None:
    """Settings, finding, tests and both tables as JSON."""
    log = write_log(tmp_path / "log.tsv", REUSED, 10_000, 0.25)
    found = json.loads(audit(log, "--json", code=1).stdout)
    assert (found["n"], found["sigma"], found["alpha"]) == (10_000, 0.25, 0.001)
    assert (found["found"], found["factor"], found["effective_n"]) == (True, 4, 2500)
    assert found["missing"] == [9997, 9998, 9999]
    assert found["printed"]["certified"]["0.75"] > found["remaining"]["certified"]["0.75"]
    assert [test["factor"] for test in found["tests"]][:3] == [2, 3, 4]
    assert found["inconsistent"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n", "1000"), "the largest is 0.616 for n = 1000"),
        (("--sigma", "0"), "sigma = 0.0: must be finite and greater than 0"),
        (("--alpha", "2"), "alpha = 2.0: must be in"),
    ],
)
def test_bad_settings_end_with_two(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """One line names the field, its value and the limit."""
    log = write_log(tmp_path / "log.tsv", HONEST, 10_000, 0.25)
    assert message in audit(log, *arguments, code=2).stderr


def test_a_file_that_is_no_log_ends_with_two(tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "table.md").write_text("| a |\n")
    assert "table.md: has no column 'idx'" in audit(tmp_path / "table.md", code=2).stderr
