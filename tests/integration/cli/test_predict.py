"""`vouchsafe predict`: what it takes, what it refuses before it loads, and what it prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from models.certificates.alpha import family_share
from service.cli import predict as cli_predict
from service.cli.answers import shown, table_of
from service.cli.files import pictures
from service.cli.main import app
from service.predictions.results import example
from service.predictions.schemas import LabelCount
from tests.support.paths import ROOT

SHIP = ROOT / "docs" / "ship.png"
REFUSED = """
import sys
sys.modules["torch"] = None
sys.argv[0] = "vouchsafe"
from service.cli.main import main
main()
"""
QUICK = ("--mode", "predict", "--n", "20")
runner = CliRunner()


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the test's own, and a wide console."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `pics` with pictures of every kind of name, and `empty`."""
    for name in ("b.PNG", "a.png", "c.jpeg", "d.jpg", "e.webp", "f.txt", ".hidden.png"):
        (tmp_path / "pics" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pics" / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named(arguments: list[str]) -> list[str]:
    return [str(path) for path in pictures(arguments)]


def test_a_folder_stands_for_its_pictures_sorted(folder: Path) -> None:
    """Files that end as pictures do, whatever the case; none that is hidden, nor other files."""
    found = ["pics/a.png", "pics/b.PNG", "pics/c.jpeg", "pics/d.jpg", "pics/e.webp"]
    assert named(["pics"]) == found
    assert named(["pics/f.txt", "pics"]) == ["pics/f.txt", *found]
    (folder / "pics" / "sub.png").mkdir()
    assert named(["pics"]) == found


def test_patterns_are_expanded_in_order(folder: Path) -> None:
    """A pattern that no shell expanded stands for what it matches, folders included."""
    assert named(["pics/[ab].*", "pics/?.jp*g"]) == [
        "pics/a.png", "pics/b.PNG", "pics/c.jpeg", "pics/d.jpg",
    ]  # fmt: skip
    assert named(["pic*"]) == named(["pics"])
    assert named(["**/a.png"]) == ["pics/a.png"]


def test_a_file_whose_name_is_a_pattern_is_itself(folder: Path) -> None:
    """A name with brackets that is there is not read as a pattern."""
    (folder / "a[1].png").touch()
    (folder / "a1.png").touch()
    assert named(["a[1].png"]) == ["a[1].png"]


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("nope.png", "nope.png: No such file or directory"),
        ("pics/nope.png", "pics/nope.png: No such file or directory"),
        ("*.gif", "*.gif: matches no file"),
        ("", "an image's path is empty"),
        ("empty", "empty: the folder holds no file that ends in .jpeg, .jpg, .png, .webp"),
        ("pics/a.png/b", "pics/a.png/b: Not a directory"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, argument: str, reason: str) -> None:
    """The first argument that names no picture is an error that says so."""
    with pytest.raises(OSError, match=f"^{re.escape(reason)}$"):
        pictures(["pics", argument])


@pytest.mark.parametrize("arguments", [["pics/b.PNG"], ["pics"], ["pics/*.PNG"]])
def test_a_file_that_may_not_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """A file without permission is found before anything is asked, wherever it was named."""
    opened = Path.open

    def guarded(path: Path, *options: Any) -> Any:
        if path.name == "b.PNG":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *options)

    monkeypatch.setattr(Path, "open", guarded)
    with pytest.raises(OSError, match=r"^pics/b\.PNG: Permission denied$"):
        pictures(arguments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nope.png"], "nope.png: No such file or directory"),
        (["empty"], "empty: the folder holds no file that ends in .jpeg, .jpg, .png, .webp"),
        (["pics", "--sigma", "9"], "sigma: Input should be less than or equal to 4 (it is 9.0)"),
        (["pics", "--alpha", "0.5"], "alpha: Input should be less than 0.5 (it is 0.5)"),
        (["pics", "--n0", "0"], "n0: Input should be greater than or equal to 1 (it is 0)"),
        (["pics", "--task", "pets"], 'There is no task "pets"; there are default'),
    ],
)
def test_it_is_refused_before_anything_loads(folder: Path, arguments: list[str], line: str) -> None:
    """A bad path or field ends it with 2 and one line, where torch cannot even be imported."""
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-c", REFUSED, "predict", *arguments, "--json"],
        env={**os.environ, "PYTHONPATH": str(SHIP.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"vouchsafe: {line}\n"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--n", "9"], "the smallest n that works is 11"),
        (["--sigma", "1.5"], "supports at most 1"),
        (["--n", "11", "--family-alpha", "0.001"], "the smallest n that works is"),
        (["--family-alpha", "0.5"], "family alpha = 0.5: must be above 0 and below 0.5"),
        (["--family-alpha", "0.01", "--alpha", "0.01"], "--alpha and --family-alpha exclude"),
        (["--n", "60000"], "n = 60000 makes 60100 rows: at most 50000 may wait"),
    ],
)
def test_what_the_task_or_the_settings_rule_out_is_refused_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], line: str
) -> None:
    """Limits that are no constants are known without networks as well."""
    monkeypatch.setenv("VOUCHSAFE_MAX_QUEUE_ROWS", "50000")
    monkeypatch.setitem(sys.modules, "service.processes.embedded", None)
    result = runner.invoke(app, ["predict", "pics", *options])
    assert result.exit_code == 2
    assert line in " ".join(result.stderr.split())


def test_json_has_a_line_an_input_in_order(tmp_path: Path) -> None:
    """Each line has its image, and the answer or the problem; a bad picture stops nothing."""
    shutil.copy(SHIP, tmp_path / "b.png")
    (tmp_path / "a.png").write_text("no image")
    question = ["predict", str(SHIP), str(tmp_path), str(SHIP), "--json", *QUICK]
    result = runner.invoke(app, question)
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    images = [str(SHIP), str(tmp_path / "a.png"), str(tmp_path / "b.png"), str(SHIP)]
    assert [line["image"] for line in lines] == images
    assert lines[1].keys() == {"image", "problem"}
    assert lines[1]["problem"]["type"] == "urn:vouchsafe:problem:unsupported-media-type"
    assert lines[1]["problem"]["status"] == 415
    answers = [lines[0], lines[2], lines[3]]
    assert [(line["label"], line["n"]) for line in answers] == [("ship", 20)] * 3
    assert all("problem" not in line for line in answers)


def test_a_family_shares_its_alpha(tmp_path: Path) -> None:
    """Each picture has an equal share, a bad one too; m is on the standard error."""
    (tmp_path / "a.png").write_text("no image")
    for name in ("b.png", "c.png"):
        shutil.copy(SHIP, tmp_path / name)
    result = runner.invoke(
        app, ["predict", str(tmp_path), "--family-alpha", "0.03", "--json", *QUICK]
    )
    assert result.exit_code == 1
    assert "m = 3: each image has alpha 0.01\n" in result.stderr
    bad, *answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert "problem" in bad
    assert [line["alpha"] for line in answers] == [family_share(0.03, 3)] * 2


def test_a_picture_that_vanishes_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there when the paths were checked and cannot be read later has its line too."""
    gone = tmp_path / "gone.png"
    monkeypatch.setattr(cli_predict, "pictures", lambda _: [gone, SHIP])
    result = runner.invoke(app, ["predict", "any", "--json", *QUICK])
    assert result.exit_code == 1
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["problem"]["detail"] == "The file cannot be read: No such file or directory"
    assert second["label"] == "ship"


def test_lines_are_printed_as_they_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first answer is on the standard output before the second picture is read."""
    second = tmp_path / "second.png"
    shutil.copy(SHIP, second)
    read, printed = Path.read_bytes, []

    def watched(path: Path) -> bytes:
        if path in (SHIP, second):
            printed.append(capsys.readouterr().out)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", watched)
    with pytest.raises(SystemExit):
        app(["predict", str(SHIP), str(second), "--json", *QUICK])
    assert printed[0] == ""
    assert json.loads(printed[1])["image"] == str(SHIP)


def test_where_the_networks_stop_each_image_has_its_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that fails leaves no input without a line, and the exit status is 1."""

    def breaks(*_: object) -> None:
        raise RuntimeError("no device")

    ended: list[int] = []
    monkeypatch.setattr("service.processes.runtime.load_and_warm", breaks)
    monkeypatch.setattr("service.processes.runtime.leave", ended.append)
    result = runner.invoke(app, ["predict", str(SHIP), str(SHIP), "--json", *QUICK])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(SHIP)] * 2
    assert all("the networks stopped: " in line["problem"]["detail"] for line in lines)
    assert result.stderr.count("the networks stopped") == 1
    assert (result.exit_code, ended) == (1, [1])


def test_predict_repeats_itself() -> None:
    """The same question has the same counts again."""
    question = ["predict", str(SHIP), "--json", "--n", "60", "--n0", "10"]
    first, second = (json.loads(runner.invoke(app, question).stdout) for _ in range(2))
    assert first["label"] == "ship"
    assert first["counts"] == second["counts"]
    assert sum(count["count"] for count in first["counts"]) == 60


def test_without_json_it_prints_a_table(tmp_path: Path) -> None:
    """A file that is no image is an error line on standard error; the table has the others."""
    text = tmp_path / "text.png"
    text.write_text("no image")
    result = runner.invoke(app, ["predict", str(text), str(SHIP), *QUICK])
    assert result.exit_code == 1
    assert "ship" in result.stdout
    assert f"{text}: The image is not a JPEG, PNG or WebP" in result.stderr


def test_the_table_has_gray_levels_within_100_columns() -> None:
    """A row has the radius in gray levels, 1.88 rounded down, and stays on one line."""
    votes = [LabelCount(label=label, count=333) for label in ("airplane", "frog", "cat")]
    answer = example().model_copy(update={"counts": votes})
    console = Console(width=100, file=StringIO(), record=True)
    console.print(table_of([(Path("docs/ship.png"), answer)]))
    (row,) = [line for line in console.export_text().splitlines() if "docs/ship.png" in line]
    assert "airplane 333, frog 333, cat 333 of 999" in row
    assert "1.8" in row.split()


def test_the_table_says_what_was_chosen_among() -> None:
    """The labels stand beneath it, ten at most, with the warning about pictures of none of them."""
    many = [f"l{number}" for number in range(1, 13)]
    for labels, named in ((["cat", "frog"], "2: cat, frog. A"), (many, "12: l1,")):
        caption = table_of([(SHIP, example().model_copy(update={"labels": labels}))]).caption
        assert f"Each label was chosen among {named}" in str(caption)
    assert "l10 and 2 more. A picture of none of them gets one of them too." in str(caption)


def test_names_that_are_not_utf8_are_shown() -> None:
    """Bytes of a file's name that no text has are replaced, so that every line can be written."""
    name = shown(Path(os.fsdecode(b"pics/b\xff.png")))
    assert name == "pics/b\ufffd.png"
    assert json.loads(json.dumps({"image": name}).encode()) == {"image": name}
