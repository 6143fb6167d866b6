"""The commands `tables` and `plots`: files, formats, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from service.cli.main import app
from tests.support.logs import write_log

runner = CliRunner()


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder of two logs of one data set, at two values of k."""
    folder = tmp_path / "imagenet"
    folder.mkdir()
    write_log(folder / "unadapted-0.25.tsv", [0, 1, 5, 400], 1000, 0.25)
    write_log(folder / "unadapted-k1.0-0.25.tsv", [0, 9, 600, 700], 1000, 0.25)
    return folder


def run(*arguments: object, code: int = 0) -> Result:
    result = runner.invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result


def test_tables_are_printed_as_markdown(logs: Path) -> None:
    """All of them, or those that are wanted; blank where no log is."""
    text = run("tables", logs).stdout
    assert all(f"**Table {number}: " in text for number in range(1, 11))
    assert "**CIFAR-10 (not in the paper): " in text
    (line,) = [
        each for each in run("tables", logs, "--table", "5").stdout.splitlines()
        if each.startswith("| 0.25 | 1.8 |")
    ]  # fmt: skip
    assert "| 100.0 [51.0, 100.0] |" in line
    assert "| 0.5 | 1.8 |  |  |" in run("tables", logs, "--table", "5").stdout


def test_tables_are_written_in_every_format(logs: Path, tmp_path: Path) -> None:
    """Eleven tables in three formats, or in the wanted one; the folder is made."""
    result = run("tables", logs, "--out", tmp_path / "all" / "tables")
    assert "wrote 11 tables" in result.stderr
    assert "; 4 have figures" in result.stderr
    names = sorted(file.name for file in (tmp_path / "all" / "tables").iterdir())
    assert len(names) == 33
    assert names[:3] == ["cifar10.csv", "cifar10.md", "cifar10.tex"]
    run("tables", logs, "--out", tmp_path / "one", "--format", "latex", "--table", "10")
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["table-10.tex"]


def test_a_log_without_a_place_is_named(logs: Path) -> None:
    """A misspelled name would otherwise be a blank cell."""
    log = logs / "unadapted-0.25.tsv"
    assert "imagenet/our-0.25 is in no table" in run("tables", f"imagenet/our-0.25={log}").stderr


def test_plots_draw_curves_and_ablations(logs: Path, tmp_path: Path) -> None:
    """A curve a data set, and the ablation that has two points, each as PNG and SVG."""
    run("plots", logs, "--out", tmp_path / "plots")
    names = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert names == ["ablation-k.png", "ablation-k.svg", "curve-imagenet.png", "curve-imagenet.svg"]
    svg = (tmp_path / "plots" / "curve-imagenet.svg").read_text()
    assert "unadapted-k1.0-0.25" in svg


@pytest.mark.parametrize("command", ["tables", "plots"])
def test_logs_that_cannot_be_used_end_with_two(command: str, tmp_path: Path) -> None:
    """One line names the file, or the folder."""
    (tmp_path / "a.tsv").write_text("idx\tlabel\n")
    result = run(command, tmp_path / "a.tsv", code=2)
    assert "a.tsv: has no column 'predict'" in result.stderr
    (tmp_path / "empty").mkdir()
    assert "the folder has no .tsv" in run(command, tmp_path / "empty", code=2).stderr


def test_nothing_to_draw_and_unknown_tables_end_with_two(logs: Path, tmp_path: Path) -> None:
    """An attack's log has no curve, and no folder is made; there are ten tables and cifar10."""
    attacked = tmp_path / "attacked.tsv"
    attacked.write_text("idx\tlabel\tpredict\tbase\tnorm\tcorrect\ttime\n0\t1\t1\t1\t0.5\t1\t2\n")
    result = run("plots", attacked, "--out", tmp_path / "plots", code=2)
    assert "there is nothing to draw" in result.stderr
    assert not (tmp_path / "plots").exists()
    result = run("tables", logs, "--table", "11", code=2)
    assert "table = '11': must be 1 to 10, or cifar10" in result.stderr
