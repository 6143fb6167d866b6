"""The command `concepts`: before and after an attack, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from service.cli.main import app
from tests.support import onnx_files
from tests.support.paths import ROOT

SHIP = str(ROOT / "docs" / "ship.png")
QUICK = ("--steps", "10", "--rows", "8", "--top", "3")
runner = CliRunner()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder of the test's own, and a list of concepts beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("VOUCHSAFE_RUNTIME", "torch")
    Path("words.txt").write_text("ship\nvessel\nplane\nfrog\nthing on water\tboat\n")


def concepts(*arguments: str, words: str = "words.txt", code: int = 0) -> Result:
    result = runner.invoke(app, ["concepts", SHIP, "--concepts", words, *arguments])
    assert result.exit_code == code, result.output
    return result


def document(folder: str) -> Any:
    return json.loads(Path(folder, "concepts.json").read_text())


def test_an_attack_changes_what_the_undefended_head_sees() -> None:
    """Its top concepts leave the ship; behind the denoiser they stay. The same again each time."""
    printed = concepts(*QUICK, "--out", "one").stdout
    found = document("one")
    assert found["label"] == found["answers"]["original"] == "ship"
    assert found["answers"]["attacked"] != "ship"
    assert 0.49 < found["attack"]["norm"] <= 0.5
    undefended, defended = found["concepts"]["undefended"], found["concepts"]["defended"]
    ships = {"ship", "vessel", "thing on water"}
    assert set(undefended["original"]) == set(defended["attacked"]) == ships
    before, after = (undefended[name].get("ship") for name in ("original", "attacked"))
    assert after is None or after["share"] < before["share"] / 2
    assert before["cosine"] > max(each["cosine"] for each in undefended["attacked"].values())
    assert 0.9 < sum(each["share"] for each in undefended["original"].values()) <= 1
    assert "plane" in printed
    assert f"{found['scale']:.4g} times" in printed
    with Image.open("one/concepts.png") as picture:
        assert picture.width > 1000
    assert Path("one", "concepts.svg").read_text().startswith("<?xml")
    concepts(*QUICK, "--out", "two")
    for file in Path("one").iterdir():
        assert Path("two", file.name).read_bytes() == file.read_bytes()


def test_an_attack_on_the_defended_head_finds_more_than_one_on_the_classifier() -> None:
    """At eps 1 its gradient, through noise and denoiser, costs the ship more of its share."""
    for against in ("undefended", "defended"):
        concepts(*QUICK, "--eps", "1", "--top", "5", "--against", against, "--out", against)
    alone, through = (
        document(against)["concepts"]["defended"]["attacked"]
        for against in ("undefended", "defended")
    )
    assert through["ship"]["cosine"] < alone["ship"]["cosine"]
    assert document("defended")["attack"]["against"] == "defended"


def test_concepts_may_stand_between_commas() -> None:
    """As many as there are; the label may be one that the image does not show."""
    others = ",".join(f"concept {index}" for index in range(40))
    quick = ("--steps", "2", "--rows", "2", "--top", "50", "--attack", "random")
    concepts(*quick, "--label", "frog", "--out", "out", words=f"ship, tree frog,{others},")
    found = document("out")
    names = set(found["concepts"]["undefended"]["original"])
    assert len(names) == 42
    assert {"ship", "tree frog", "concept 39"} <= names
    assert (found["label"], found["attack"]["name"]) == ("frog", "random")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--eps", "0"), "eps = 0.0: must be finite and greater than 0"),
        (("--attack", "autoattack"), "attack = autoattack: must be one of pgd, eot, pgd-linf"),
        (("--sigma", "3"), "sigma = 3.0: must be from 0.02 to 1.0"),
        (
            ("--label", "boat"),
            "label = 'boat': must be a label of task default, as airplane, automobile",
        ),
        (("--task", "pets"), "there are 0 tasks 'pets'"),
        (("--task", "own"), "task own: its classifier of kind onnx has fixed labels"),
    ],
)
def test_what_cannot_be_used_is_refused(
    options: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    """One line with the field, its value and its limit; nothing is written."""
    onnx_files.put_task(tmp_path / "data")
    assert reason in concepts(*options, "--out", "out", code=2).stderr
    assert not Path("out").exists()


def test_a_list_of_concepts_is_checked() -> None:
    """Two different concepts at least."""
    Path("words.txt").write_text("ship\n")
    assert "concepts: there are 1; the fewest are 2" in concepts(code=2).stderr
    Path("words.txt").write_text("ship\nfrog\nship\n")
    assert "concepts: 'ship' occurs twice" in concepts(code=2).stderr
    assert "concepts: 'frog' occurs twice" in concepts(words="ship,frog,frog", code=2).stderr
    assert "concepts: there are 0; the fewest are 2" in concepts(words=",", code=2).stderr


@pytest.mark.parametrize(("image", "words"), [(SHIP, "missing.txt"), ("missing.png", "words.txt")])
def test_a_file_that_is_missing_is_named(image: str, words: str) -> None:
    """The error of `main` has the list or the picture."""
    with pytest.raises(FileNotFoundError, match="missing"):
        runner.invoke(app, ["concepts", image, "--concepts", words], catch_exceptions=False)
