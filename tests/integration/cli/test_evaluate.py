"""The command `evaluate`: on this machine, on a server, resumed, refused."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from models.base_network import Base
from models.bundle import DEFAULT_TASK, MODELS, read_bundle, write_bundle
from models.evaluation.scores import average_certified_radius
from service.cli.evaluation.progress import Watch
from service.cli.main import app
from tests.support.datasets import twin
from tests.support.fakes import FakeClock
from tests.support.listening import Listening, listening
from tests.support.serving import DIGEST, PNG, Service, nine_of_ten

runner = CliRunner()
LIMIT_BYTES = 2**12
QUICK = ("--n0", "10", "--n", "40", "--limit", "3")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another working directory than the repository, and a data folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of a cat and one of a dog."""
    for name in ("cat/1.png", "cat/2.png", "cat/3.png", "cat/4.png", "cat/5.png", "dog/6.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(PNG)
    return tmp_path / "pictures"


def evaluate(*arguments: str, code: int = 0) -> Result:
    result = runner.invoke(app, ["evaluate", *arguments])
    assert result.exit_code == code, result.output
    return result


def log(name: str, out: str = "evaluation") -> list[list[str]]:
    header, *lines = Path(out, f"{name}.tsv").read_text().splitlines()
    assert header.split("\t") == ["idx", "label", "predict", "radius", "correct", "time"]
    return [line.split("\t") for line in lines]


def document(out: str = "evaluation") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(out, "results.json").read_text())
    return found


def test_a_task_of_networks_that_were_fetched(tmp_path: Path) -> None:
    """Networks in the models folder are read from there."""
    default, head = read_bundle(DEFAULT_TASK), tmp_path / "data" / "models" / "head"
    shutil.copytree(MODELS / default.classifier.folder, head)
    classifier = replace(default.classifier, folder=str(head))
    own = replace(default, id="own", denoiser=Base("none"), classifier=classifier)
    write_bundle(tmp_path / "data" / "tasks" / "own", own, {})
    evaluate("--task", "own", "--n0", "10", "--n", "40", "--limit", "1")
    assert document()["runs"]["own, sigma 0.25"]["images"] == 1


def test_the_slice_with_baselines(tmp_path: Path) -> None:
    """Without --images in any folder: logs, counts, results, table and curve of every run."""
    printed = json.loads(
        evaluate(*QUICK, "--baseline", "none", "--baseline", "undefended", "--json").stdout
    )
    assert printed == document()
    assert list(printed["runs"]) == ["default, sigma 0.25", "none, sigma 0.25", "undefended"]
    assert printed["images"]["images"] == 3
    first = printed["runs"]["default, sigma 0.25"]
    settings = {"task", "bundle", "numerics", "sigma", "n0", "n", "alpha", "method", "seed", "k"}
    assert settings <= set(first["settings"])
    lines = log("default-0.25")
    assert [line[0] for line in lines] == ["0", "166", "332"]
    radii, correct = ([float(line[3]) for line in lines], [line[4] == "1" for line in lines])
    mean = average_certified_radius(radii, correct)
    assert first["ACR"]["value"] == pytest.approx(mean, abs=1e-4)
    assert set(first["by rule"]) == {"two-sided", "cohen"}
    assert first["by rule"]["two-sided"]["ACR"] == first["ACR"]
    assert printed["runs"]["undefended"]["clean"]["count"] == 3
    assert "certified" not in printed["runs"]["undefended"]
    assert [pair["before"] for pair in printed["compared"]] == ["default, sigma 0.25"] * 2
    found = {file.name for file in (tmp_path / "evaluation").iterdir()}
    assert {"table.md", "curve.png", "curve.svg", "none-0.25.counts.jsonl"} <= found
    assert "| ACR, cohen |" in (tmp_path / "evaluation" / "table.md").read_text()


def test_baselines_alone() -> None:
    """The task itself is left out."""
    evaluate(*QUICK, "--baseline", "undefended", "--only-baselines")
    assert list(document()["runs"]) == ["undefended"]


def test_a_data_set_of_the_paper(tmp_path: Path) -> None:
    """Some of its selected images; the table names the set, and how many images of how many."""
    twin("cifar10", tmp_path, 1004)
    result = evaluate("--dataset", "cifar10", "--root", str(tmp_path), *QUICK)
    assert "CIFAR-10: 3 of 1004 images" in result.stdout
    assert [line[0] for line in log("default-0.25")] == ["0", "334", "668"]
    assert document()["images"]["of"] == 1004
    assert Path("evaluation", "table.md").read_text().startswith("CIFAR-10: 3 of 1004 images\n\n|")
    twin("stl10", tmp_path, 8)
    refused = evaluate("--dataset", "stl10", "--root", str(tmp_path), code=2)
    assert "STL-10: 'car' is no label of the task; did you mean 'cat'?" in refused.stderr


def test_a_resumed_run_computes_only_the_rest() -> None:
    """The images that the files have keep their lines, times included; the others are added."""
    evaluate(*QUICK)
    whole = log("default-0.25")
    counts = Path("evaluation", "default-0.25.counts.jsonl")
    lines = counts.read_text().splitlines(keepends=True)
    counts.write_text("".join(lines[:3]) + lines[3][:20])
    result = evaluate(*QUICK)
    assert "1 of 1 images: default, sigma 0.25, 0:00 left" in result.stderr
    again = log("default-0.25")
    assert again[:2] == whole[:2]
    assert [line[:5] for line in again] == [line[:5] for line in whole]
    refused = evaluate(*QUICK, "--seed", "1", code=2)
    assert "has seed = 0, and the run has 1: choose another --out" in refused.stderr


def test_a_server_computes(pictures: Path, tmp_path: Path) -> None:
    """The rows run on the server, many images at once; labels are found by name."""
    service = Service(data_dir=tmp_path / "served")
    with listening(service) as running:
        options = ("--server", running.url, "--images", str(pictures), "--sigma", ".25")
        evaluate(*options, "--sigma", ".5", "--n", "200", "--at-once", "4")
    assert [line[:3] for line in log("default-0.5")] == [
        *([str(index), "2", "2"] for index in range(5)),
        ["5", "3", "2"],
    ]
    found = document()["runs"]["default, sigma 0.5"]
    assert found["bundles"] == [DIGEST]
    assert found["clean"]["count"] == found["certified"]["0.25"]["count"] == 5
    assert found["settings"]["n"] == 200
    assert "by rule" not in found


def test_a_server_that_fails_is_gone_on_with(pictures: Path, tmp_path: Path) -> None:
    """An error ends the run with 1 and a line; the same command resumes."""
    answered = 0

    def once(rows: int) -> list[int]:
        nonlocal answered
        answered += rows
        service.voter.fails = answered >= 300
        return nine_of_ten(rows)

    service = Service(once, data_dir=tmp_path / "served")
    options = ("--images", str(pictures), "--n", "200", "--at-once", "1")

    with listening(service) as running:
        failed = evaluate("--server", running.url, *options, code=1)
        assert "keeps every image so far" in failed.stderr
        assert "500: " in failed.stderr
        done = log("default-0.25")
        assert 0 < len(done) < 6
        service.voter.fails, service.voter.votes = False, nine_of_ten
        evaluate("--server", running.url, *options)
    assert log("default-0.25")[: len(done)] == done
    assert len(log("default-0.25")) == 6


def _refusal(running: Listening, *options: str) -> str:
    return evaluate("--server", running.url, *options, code=2).stderr


def test_a_run_that_a_server_cannot_do_is_refused(pictures: Path, tmp_path: Path) -> None:
    """An unknown task, a sigma beyond the task's, a baseline, a large picture, a wrong key."""
    service = Service(
        data_dir=tmp_path / "served", api_keys=("k" * 32,), max_image_bytes=LIMIT_BYTES
    )
    (tmp_path / "key").write_text("k" * 32 + "\n")
    key = ("--key-file", str(tmp_path / "key"), "--images", str(pictures))
    with listening(service) as running:
        assert "0 tasks 'pets': it has default" in _refusal(running, *key, "--task", "pets")
        assert "sigma = 2.0: must be from 0.02 to 1.0" in _refusal(running, *key, "--sigma", "2")
        assert "leave out --server" in _refusal(running, *key, "--baseline", "none")
        assert "401: " in _refusal(running)
        (pictures / "dog" / "6.png").write_bytes(PNG + bytes(LIMIT_BYTES))
        assert "dog/6.png: 413: " in _refusal(running, *key)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--task", "pets"), "there are 0 tasks 'pets'; the tasks are default"),
        (("--sigma", "9"), "sigma = 9.0: must be from 0.02 to 4"),
        (
            ("--dataset", "mnist", "--root", "."),
            "dataset = 'mnist': must be one of imagenet, stl10",
        ),
        (("--dataset", "cifar10"), "--dataset and --root need each other"),
        (("--root", "."), "--dataset and --root need each other"),
        (
            ("--dataset", "cifar10", "--images", "x", "--root", "."),
            "--images and --dataset are two sets of images",
        ),
        (("--n", "3"), "n = 3 at alpha = 0.001 can only ever abstain"),
        (("--sigma", ".25", "--sigma", ".250"), "two runs would be default-0.25"),
        (("--only-baselines",), "--only-baselines leaves no run: add --baseline"),
        (("--server", "localhost"), "url = 'localhost': must begin with http"),
        (("--server", "http://127.0.0.1:1"), "the server's tasks cannot be read"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(options: tuple[str, ...], reason: str) -> None:
    """One line with the field, its value and its limit; nothing is written."""
    assert reason in evaluate(*options, code=2).stderr
    assert not Path("evaluation").exists()


@pytest.mark.parametrize("baseline", [(), ("--baseline", "undefended")])
def test_broken_pictures_are_named_before_any_work(
    pictures: Path, baseline: tuple[str, ...]
) -> None:
    """All of them at once: without them the images are others, and the figures begin again."""
    for name in ("cat/5.png", "dog/6.png"):
        (pictures / name).write_bytes(PNG[:60])
    refused = evaluate("--images", str(pictures), *baseline, code=2).stderr
    assert "cat/5.png: The PNG is truncated" in refused
    assert "dog/6.png: The PNG is truncated" in refused
    assert not Path("evaluation").exists()


def test_two_evaluations_in_one_folder_are_refused() -> None:
    """The second would replace the files that the first one writes its records to."""
    Path("evaluation").mkdir()
    with Path("evaluation", ".lock").open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert "evaluation: another evaluation writes to it" in evaluate(*QUICK, code=2).stderr
    assert [path.name for path in Path("evaluation").iterdir()] == [".lock"]


def test_a_line_of_progress_comes_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal; it has the images done and the time left."""
    clock = FakeClock()
    watch = Watch(2000, clock=clock)
    for _ in range(12):
        clock.advance(4.0)
        watch.advance("default, sigma 0.25")
    assert capsys.readouterr().err.splitlines() == [
        f"{done} of 2000 images: default, sigma 0.25, 2:{left} left"
        for done, left in ((3, "13:08"), (6, "12:56"), (9, "12:44"), (12, "12:32"))
    ]
