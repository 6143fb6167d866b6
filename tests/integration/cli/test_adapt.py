"""The commands about tasks, with the fake adaptation in the real one's place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from models.adaptation.plan import Status
from models.bundle import read_bundle
from models.evaluation.datasets.registry import DATASETS, class_names, prompt_template
from models.zoo.captions import clean_caption
from service.cli.adapt import ProgressLines, dataset_labels
from service.cli.main import app
from service.config import Settings
from service.secrets import load_secret
from service.tasks import process
from service.tasks.process import Run
from service.tasks.store import Store
from tests.support.adapting import FAKE, FAST, is_alive, starts, wait_until
from tests.support.fake_adaptation import GO
from tests.support.fakes import FakeClock
from tests.support.paths import ROOT

ADAPT = (
    "from service.cli import main; from service.tasks import process;"
    "from tests.support.adapting import FAKE;"
    "process.JOB = FAKE; main.main()"
)
PROMPTS = {"imagenet": 11, "cars": 3, "caltech101": 1, "cropdiseases": 2}
"""How many labels of a data set caption cleaning would change: brackets, slashes, model codes."""
runner = CliRunner()


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store of a data folder and a working directory of the test's own."""
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("service.tasks.process.JOB", FAKE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\n\n  dog \nship\n")
    return Store(Settings(), load_secret(tmp_path / "data"))


def adapt(ways: str = "plain", *options: str) -> Result:
    """`vouchsafe adapt`, going about it in one of the fake's ways."""
    template = ["--template", f"{ways} {{}}"]
    return runner.invoke(app, ["adapt", "--labels", "labels.txt", *template, *options])


def listed() -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    return told


def test_adapt_makes_a_task_and_a_contact_sheet(store: Store, tmp_path: Path) -> None:
    """Labels, one a line, become a published task; a sheet shows its pictures, a row a label."""
    result = adapt("plain", "--shots", "2", "--name", "Pets", "--out", "sheet.png")
    assert result.exit_code == 0, result.output
    (task,) = store.all()
    assert (task.labels, task.name, task.owner) == (("cat", "dog", "ship"), "Pets", None)
    assert task.id in result.stdout
    assert '"clean": 0.5' in result.stdout
    assert f"vouchsafe evaluate --task {task.id} --images FOLDER" in result.stdout
    assert read_bundle(store.tasks / task.id).labels == task.labels
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height = sheet.size
        assert (width, height) == (220 + 2 * 68 + 4, 3 * 68 + 4)
        assert sheet.getpixel((220 + 30, 4 + 68 + 30)) == (20, 0, 99)
        words = sheet.crop((0, 0, 220, height)).convert("L")
        assert words.getextrema() == (0, 255)
    again = adapt("plain", "--shots", "2")
    assert again.exit_code == 0
    assert len(store.all()) == len(starts(store, task)) == 1


def test_a_data_set_gives_labels_and_template(store: Store) -> None:
    """The labels in the order of its classes; another template may be given."""
    made = runner.invoke(app, ["adapt", "--dataset", "cifar10", "--shots", "1"])
    assert made.exit_code == 0, made.output
    (task,) = store.all()
    assert list(task.labels) == list(class_names("cifar10").values())
    assert task.template == "This is a photo of a {}."
    for options, reason in (
        (["--dataset", "mnist"], "dataset = 'mnist': must be one of imagenet, stl10, sun397"),
        (["--dataset", "cifar10", "--labels", "labels.txt"], "give --labels or --dataset"),
        ([], "give --labels or --dataset"),
    ):
        refused = runner.invoke(app, ["adapt", *options])
        assert refused.exit_code == 2
        assert reason in refused.stderr


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_sets_words_are_read_as_they_stand(name: str) -> None:
    """Caption cleaning changes no word in its template; a few labels have a prompt for that."""
    labels, template = dataset_labels(name), prompt_template(name)
    for label in labels:
        caption = template.format(label if isinstance(label, str) else label[1])
        assert clean_caption(caption).split() == caption.lower().split()
    assert sum(isinstance(label, tuple) for label in labels) == PROMPTS.get(name, 0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--shots", "65"], "shots is 65; it must be 1 to 64"),
        (["--denoiser", "huge"], "there are if-ii-l, if-ii-l-96, nano"),
        (["--name", "n" * 129], "name"),
        (["--labels", "unknown.txt"], "--allow-unknown-labels"),
        (["--labels", "one.txt"], "labels has 1 entries"),
        (["--labels", "latin.txt"], "is not UTF-8"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], word: str, tmp_path: Path) -> None:
    """Settings outside their limits end with 2 and a line that names them; nothing is queued."""
    (tmp_path / "unknown.txt").write_text("cat\nxylophone\n")
    (tmp_path / "one.txt").write_text("cat\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\nth\xe9\n")
    result = adapt("plain", *options)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split()).replace("allow_unknown_labels", "--allow-unknown-labels")
    assert word in said
    assert len(listed()) == 1


def test_off_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A line comes with each stage, and with every 10 seconds of one; none between."""
    clock = FakeClock()
    lines = ProgressLines(clock)
    running = Status("running", stage="personalizing", losses={"personalizing": 0.25})
    seen = [
        (0.0, Status("queued")),
        (0.2, Status("queued")),
        (0.2, Status("running", stage="synthesizing", progress=0.01, eta_seconds=83)),
        (9.9, Status("running", stage="synthesizing", progress=0.3, eta_seconds=50)),
        (0.1, Status("running", stage="synthesizing", progress=0.31, eta_seconds=49)),
        (9.9, replace(running, progress=0.4)),
        (9.9, replace(running, progress=0.5)),
        (0.2, replace(running, progress=0.6)),
    ]
    for seconds, status in seen:
        clock.advance(seconds)
        lines.show(status)
    assert capsys.readouterr().err.splitlines() == [
        "  0% queued",
        "  1% synthesizing, 1:23 left",
        " 31% synthesizing, 0:49 left",
        " 40% personalizing, loss 0.25",
        " 60% personalizing, loss 0.25",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_adapt_shows_lines_or_a_bar(
    monkeypatch: pytest.MonkeyPatch, store: Store, terminal: bool
) -> None:
    """What is no terminal gets whole lines; a terminal keeps the bar, which is drawn over."""
    monkeypatch.setattr("service.cli.adapt.errors", Console(stderr=True, force_terminal=terminal))
    result = adapt("plain", "--shots", "1")
    assert result.exit_code == 0, result.output
    assert ("\x1b[" in result.stderr) is terminal
    assert ("\r" in result.stderr) is terminal
    if not terminal:
        assert all(line[3:5] == "% " for line in result.stderr.splitlines())
        assert result.stderr.startswith("  0% queued\n")


def test_a_failure_is_told(store: Store) -> None:
    """A job that fails ends the command with 1 and the reason; the same command tries it again."""
    result = adapt("fail")
    assert result.exit_code == 1
    assert "lower steps" in result.stderr
    assert adapt("fail").exit_code == 1
    assert len(starts(store, store.all()[0])) == 2


@pytest.mark.parametrize("told", ["the status", "the job", "the secret", "the sheet"])
def test_a_disk_that_takes_nothing_is_told_in_a_line(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """A full or read-only disk ends the command with 1, its path and the reason, at any point."""
    full, read_only = "No space left on device", "Read-only file system"

    def takes_nothing(*_: object) -> None:
        raise OSError(28, full)

    def is_read_only(path: Path, *_: object) -> None:
        raise OSError(30, read_only, str(path))

    monkeypatch.setattr(process, "Patience", lambda: FAST)
    if told == "the status":
        monkeypatch.setattr(Status, "write", takes_nothing)
        result = adapt("die")
        line = f"{store.jobs / store.all()[0].id}: {full}"
    elif told == "the job":
        monkeypatch.setattr("service.tasks.store.write_json", takes_nothing)
        result, line = adapt(), f"{tmp_path / 'data'}: {full}"
    elif told == "the secret":
        monkeypatch.setattr("service.cli.adapt.load_secret", is_read_only)
        result, line = adapt(), f"{tmp_path / 'data'}: {read_only}"
    else:
        result, line = adapt("plain", "--out", "away/sheet.png"), "No such file or directory"
        assert store.all()[0].status.state == "ready"
    assert result.exit_code == 1
    assert "".join(result.stderr.splitlines()).endswith(line)
    assert result.stderr.count("vouchsafe: ") == 1


def test_a_status_that_cannot_be_written_at_the_end_is_a_line(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C on a full disk ends the job's process, and says without a traceback what is wrong."""
    adapt("fail", "--shots", "1")
    (task,) = store.all()
    Status("queued").write(store.jobs / task.id)
    run = Run(store.jobs / task.id, store.tasks, ("sleep", "60"), FAST)
    run.step()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Status, "write", full)
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.05)
    run.stop()
    (record,) = [entry for entry in caplog.records if "cannot be written" in entry.message]
    assert "No space left on device" in record.message
    assert record.exc_info is None


def test_interrupted_it_goes_on_later(store: Store, tmp_path: Path) -> None:
    """Ctrl-C ends the job's process, says that the task is kept, and the same command goes on."""
    arguments = ["adapt", "--labels", "labels.txt", "--template", "wait {}"]
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", ADAPT, *arguments],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_until(lambda: any(t.status.stage == "finetuning" for t in store.unfinished()))
    (task,) = store.unfinished()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"the same command goes on" in said
    assert not is_alive(starts(store, task)[0])
    assert store.get(task.id).status.state == "queued"
    (store.jobs / task.id / GO).touch()
    assert adapt("wait").exit_code == 0
    assert store.get(task.id).status.state == "ready"


def test_a_server_in_the_same_folder_is_left_to_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process runs the job the command only watches, and ends as it does."""
    fields = ["--shots", "1"]
    adapt("fail", *fields)
    (task,) = store.all()
    Status("queued").write(store.jobs / task.id)
    elsewhere = Run(store.jobs / task.id, store.tasks, ("sleep", "60"), FAST)
    elsewhere.step()
    looks = []

    def slept(seconds: float) -> None:
        looks.append(seconds)
        assert len(looks) <= 3
        if len(looks) == 3:
            Status("ready", progress=1.0).write(store.jobs / task.id)

    monkeypatch.setattr("service.cli.adapt.time", SimpleNamespace(sleep=slept))
    try:
        result = adapt("fail", *fields)
    finally:
        elsewhere.stop()
    assert len(looks) == 3
    assert len(starts(store, task)) == 1
    assert result.exit_code == 1


def test_models_are_listed_and_shown(store: Store) -> None:
    """Each task stands in the list, the built-in one first, and `show` tells all of one."""
    adapt("plain", "--name", "[b]Pets[/b]", "--shots", "1")
    (task,) = store.all()
    table = runner.invoke(app, ["models", "list"]).stdout
    assert all(word in table for word in ("default", task.id, "[b]Pets[/b]", "ready"))
    default, pets = listed()
    assert (default["id"], len(default["labels"])) == ("default", 10)
    assert (pets["id"], pets["state"], pets["problem"]) == (task.id, "ready", None)
    assert pets["bytes"] > 10_000
    assert json.loads(runner.invoke(app, ["models", "show", task.id, "--json"]).stdout) == pets
    described = runner.invoke(app, ["models", "show", task.id]).stdout
    assert "plain {}" in described
    assert described.endswith(f"vouchsafe evaluate --task {task.id} --images FOLDER\n")
    unknown = runner.invoke(app, ["models", "show", "nothing"])
    assert (unknown.exit_code, "nothing" in unknown.stderr) == (1, True)


def test_models_are_verified(store: Store) -> None:
    """`verify` names the file that is not what its manifest states, and then ends with 1."""
    adapt("plain", "--shots", "1")
    (task,) = store.all()
    good = runner.invoke(app, ["models", "verify"])
    assert good.exit_code == 0, good.output
    assert [line.partition(":")[0] for line in good.stdout.splitlines()] == ["default", task.id]
    (store.tasks / task.id / "prompt_states.safetensors").write_bytes(b"damaged")
    bad = runner.invoke(app, ["models", "verify", task.id])
    assert bad.exit_code == 1
    assert "prompt_states.safetensors" in bad.stderr
    assert runner.invoke(app, ["models", "verify", "default"]).exit_code == 0


def test_models_are_removed(store: Store) -> None:
    """`remove` leaves nothing of a task; what is unknown or built in is refused with 1."""
    adapt("plain", "--shots", "1")
    (task,) = store.all()
    assert runner.invoke(app, ["models", "remove", task.id]).exit_code == 0
    assert store.all() == []
    for refused in (task.id, "default"):
        assert runner.invoke(app, ["models", "remove", refused]).exit_code == 1


def test_predict_asks_a_task(store: Store) -> None:
    """`predict --task` takes the task's id or name and answers in its own labels; one that is not
    ready says so."""
    adapt("plain", "--shots", "1")
    (task,) = store.all()
    ship = str(ROOT / "docs" / "ship.png")
    question = ["predict", ship, "--mode", "predict", "--n", "20", "--json", "--task"]
    result = runner.invoke(app, [*question, task.name])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["task"], told["label"] in task.labels) == (task.id, True)
    adapt("fail", "--shots", "1")
    failed = next(t for t in store.all() if t.id != task.id)
    refused = runner.invoke(app, [*question, failed.id])
    assert (refused.exit_code, "could not be made" in refused.stderr) == (2, True)
