"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.cli import app

SHIP = Path(__file__).parents[1] / "docs" / "ship.png"
runner = CliRunner()


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_help_lists_what_works_and_nothing_else() -> None:
    """Each command is listed once its feature works, and not before."""
    text = runner.invoke(app, ["--help"]).output
    commands = ("serve", "predict", "evaluate", "bench", "adapt", "models", "worker")
    assert all(command in text for command in commands)
    assert " verify " not in text


def test_predict_prints_one_answer_a_line_and_repeats_itself() -> None:
    """`--json` prints the service's own answer; the same question has the same counts again."""
    question = ["predict", str(SHIP), "--json", "--n", "60", "--n0", "10"]
    first, second = (json.loads(runner.invoke(app, question).stdout) for _ in range(2))
    assert first["label"] == "ship"
    assert first["counts"] == second["counts"]
    assert sum(count["count"] for count in first["counts"]) == 60


def test_predict_prints_a_table_and_reports_what_failed(tmp_path: Path) -> None:
    """A file that is no image is reported and makes the exit status 1; the others are answered."""
    text = tmp_path / "text.png"
    text.write_text("no image")
    result = runner.invoke(app, ["predict", str(text), str(SHIP), "--mode", "predict", "--n", "20"])
    assert result.exit_code == 1
    assert "ship" in result.stdout
    assert "text.png" in result.stderr


def test_predict_names_a_field_that_is_off() -> None:
    """Impossible settings are refused with the smallest n that works."""
    result = runner.invoke(app, ["predict", str(SHIP), "--n", "9"])
    assert result.exit_code == 2
    assert "the smallest n that works is 10" in " ".join(result.stderr.split())


def test_evaluate_prints_every_setting_beside_the_figures(tmp_path: Path) -> None:
    """The report names images, sigma, n0, n, alpha, seed, k, numerics and bundle."""
    log = tmp_path / "log.tsv"
    result = runner.invoke(
        app, ["evaluate", "--count", "2", "--n", "40", "--n0", "10", "--log", str(log)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"images", "sigma", "n0", "n", "alpha", "seed", "k", "numerics", "bundle"} <= set(report)
    assert report["images"] == 2
    assert len(log.read_text().splitlines()) == 3
