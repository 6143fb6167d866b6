"""The command `concepts`: shares by hand, before and after an attack, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from models.evaluation.concepts import ranked
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


def concepts(*arguments: str, code: int = 0) -> Result:
    result = runner.invoke(app, ["concepts", SHIP, "--concepts", "words.txt", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_concepts_are_ranked_by_their_shares() -> None:
    """The largest first, and equal ones in their order."""
    shares = np.array([0.2, 0.5, 0.2, 0.1])
    assert ranked(("a", "b", "c", "d"), shares, 3) == [("b", 0.5), ("a", 0.2), ("c", 0.2)]


def test_an_attack_changes_what_the_undefended_head_sees() -> None:
    """Its top concepts leave the ship; behind the denoiser they stay. The same again each time."""
    printed = concepts(*QUICK, "--out", "one").stdout
    document = json.loads(Path("one", "concepts.json").read_text())
    assert document["label"] == document["answers"]["original"] == "ship"
    assert document["answers"]["attacked"] != "ship"
    assert 0.49 < document["attack"]["norm"] <= 0.5
    found = document["concepts"]
    ships = {"ship", "vessel", "thing on water"}
    assert set(found["original"]["undefended"]) == set(found["attacked"]["defended"]) == ships
    before, after = (found[name]["undefended"].get("ship", 0.0) for name in found)
    assert after < before / 2
    assert 0.9 < sum(found["original"]["undefended"].values()) <= 1
    assert "plane" in printed
    with Image.open("one/concepts.png") as picture:
        assert picture.width > 1000
    assert Path("one", "concepts.svg").read_text().startswith("<?xml")
    concepts(*QUICK, "--out", "two")
    assert Path("two", "concepts.json").read_text() == Path("one", "concepts.json").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--eps", "0"), "eps = 0.0: must be finite and greater than 0"),
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
