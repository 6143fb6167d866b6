"""`evaluate --attack`: figures beside those of certificates, resumed, repeated, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from models.evaluation.attacks.registry import ATTACKS
from service.cli.evaluation import attacks
from service.cli.evaluation.command import AttackName
from service.cli.main import app
from tests.support import onnx_files

runner = CliRunner()
QUICK = ("--n0", "10", "--n", "60", "--limit", "3", "--attack-n", "40")
ATTACK = ("--attack", "pgd", "--attack-steps", "4", "--attack-rows", "4", "--eps", "0.25")
PGD = "default-0.25-pgd-0.25"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another working directory than the repository, and a data folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VOUCHSAFE_DATA_DIR", str(tmp_path / "data"))


def evaluate(*arguments: str, code: int = 0) -> Result:
    result = runner.invoke(app, ["evaluate", *arguments])
    assert result.exit_code == code, result.output
    return result


def log(name: str, out: str = "evaluation") -> list[list[str]]:
    header, *lines = Path(out, f"{name}.tsv").read_text().splitlines()
    assert header.split("\t") == ["idx", "label", "predict", "base", "norm", "correct", "time"]
    return [line.split("\t") for line in lines]


def figures(name: str, out: str = "evaluation") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(out, "results.json").read_text())["runs"][name]
    return found["attacks"]


def test_every_run_is_attacked_beside_its_certificates() -> None:
    """An undefended head falls, and a smoothed one keeps at least what it has certified; images
    that are not answered rightly to begin with are not attacked."""
    evaluate(*QUICK, "--baseline", "undefended", *ATTACK, "--eps", "0.1")
    smoothed, alone = figures("default, sigma 0.25"), figures("undefended")
    for eps in ("0.1", "0.25"):
        found = smoothed["by attack"]["pgd"][eps]
        assert found["robust"]["count"] >= found["certified"]["count"]
        assert found["contradicted"] == []
        counts = [found[name]["count"] for name in ("robust", "abstained", "misled")]
        assert sum(counts) == 3
    assert alone["predict"]["count"] == alone["empirical clean"]["count"] == 3
    assert alone["by attack"]["pgd"]["0.25"]["robust"]["count"] == 0
    assert "certified" not in alone["by attack"]["pgd"]["0.25"]
    for clean, line in zip(log("default-0.25-predict"), log(PGD), strict=True):
        assert clean[4] == "0.000000"
        if clean[5] == "1":
            assert 0.24 < float(line[4]) <= 0.25
        else:
            assert line[:6] == clean[:6]
    table = Path("evaluation", "table.md").read_text()
    for line in ("empirical clean", "robust to pgd at 0.25", "certified at 0.1, beside pgd"):
        assert f"| {line} |" in table
    assert "| certificates contradicted | 0 |  |" in table


def test_a_run_is_resumed_and_can_be_repeated() -> None:
    """Images that the file has are not attacked again, and another run finds the same answers."""
    evaluate(*QUICK, *ATTACK)
    whole = log(PGD)
    counts = Path("evaluation", f"{PGD}.counts.jsonl")
    lines = counts.read_text().splitlines(keepends=True)
    counts.write_text("".join(lines[:3]) + lines[3][:20])
    result = evaluate(*QUICK, *ATTACK)
    assert "1 of 1 images: default, sigma 0.25, pgd at 0.25, 0:00 left" in result.stderr
    assert log(PGD)[:2] == whole[:2]
    evaluate(*QUICK, *ATTACK, "--out", "again")
    assert [line[:6] for line in log(PGD, "again")] == [line[:6] for line in whole]
    refused = evaluate(*QUICK, *ATTACK, "--attack-steps", "5", code=2)
    assert "has steps = 4, and the run has 5: choose another --out" in refused.stderr
    evaluate(*QUICK, "--attack", "random", *ATTACK[2:])
    assert set(figures("default, sigma 0.25")["by attack"]) == {"random"}


def test_purified_images_are_attacked_without_a_certificate() -> None:
    """The run has clean and robust accuracy, in both norms, and nothing that is certified."""
    evaluate(
        *("--baseline", "purified", "--only-baselines", "--limit", "2"),
        *("--t-star", "2", "--draws", "2", *ATTACK, "--attack", "eot-linf", "--eps", "0.03"),
    )
    document = json.loads(Path("evaluation", "results.json").read_text())
    assert list(document["runs"]) == ["purified"]
    run = document["runs"]["purified"]
    assert "certified" not in run
    assert run["settings"]["purification"]["t_star"] == 2
    found = run["attacks"]["by attack"]
    assert set(found) == {"pgd", "eot-linf"}
    assert all("certified" not in by_eps for own in found.values() for by_eps in own.values())
    for line in log("purified-eot-linf-0.03"):
        assert float(line[4]) <= 7 / 255 * 3072**0.5 + 1e-6


def test_random_noise_needs_no_gradients(tmp_path: Path) -> None:
    """It attacks a classifier of any kind."""
    onnx_files.put_task(tmp_path / "data")
    evaluate("--task", "own", *QUICK, "--limit", "20", "--attack", "random", *ATTACK[2:])
    assert any(float(line[4]) > 0 for line in log("own-0.25-random-0.25"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--eps", "0.5"), "eps = 0.5: is an attack's; add --attack pgd"),
        (("--attack", "pgd", "--eps", "0"), "eps = 0.0: must be finite and greater than 0"),
        (("--attack", "pgd", "--eps", "inf"), "eps = inf: must be finite"),
        (("--attack", "pgd", "--attack-n", "5"), "n = 5 at alpha = 0.001 can only ever abstain"),
        (("--attack", "pgd", "--server", "http://127.0.0.1:1"), "leave out --server"),
        (("--baseline", "purified", "--task", "own"), "only a diffusion model can purify"),
        (("--baseline", "purified", "--t-star", "1000"), "t_star is 1000; this schedule has 1"),
        (("--baseline", "purified", "--auxiliary", "."), "has no auxiliary network"),
        (("--attack", "pgd", "--task", "own"), "kind onnx, which gives no gradients"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(
    options: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the field, its value and its limit; nothing is written."""
    monkeypatch.setenv("VOUCHSAFE_RUNTIME", "torch")
    onnx_files.put_task(tmp_path / "data")
    assert reason in evaluate(*options, code=2).stderr
    assert not Path("evaluation").exists()


def test_packages_attack_undefended_classifiers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their attacks are refused without such a run, and without the package."""
    monkeypatch.setattr(attacks, "find_spec", lambda name: None if name == "foolbox" else name)
    refused = evaluate("--attack", "autoattack", code=2).stderr
    assert "attack = autoattack: is for undefended classifiers, and no run has one" in refused
    refused = evaluate("--attack", "foolbox-pgd", "--baseline", "undefended", code=2).stderr
    assert "attack = foolbox-pgd: needs foolbox: install the extra bench" in refused
    assert not Path("evaluation").exists()


def test_the_command_has_every_attack() -> None:
    """Its option names those that there are."""
    assert [each.value for each in AttackName] == [*ATTACKS]
