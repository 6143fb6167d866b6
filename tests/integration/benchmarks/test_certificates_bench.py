"""`vouchsafe bench certificates`: every rule on the same rows, and what it prints is whole."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import certified_radius
from models.evaluation.datasets.cifar10 import (
    CIFAR10_LABELS,
    SLICE,
    LabelledImages,
    evaluation_slice,
)
from models.evaluation.row_labels import RowLabels
from models.evaluation.rules import RULES, Question
from service.cli.bench import certificates as bench_certificates
from service.cli.bench.certificates import by_rule, shortfall, unanimous
from service.cli.bench.speed import measured
from service.cli.main import app

QUESTION = Question(0.25, 0.001, 10, 0.0)


def test_the_command_prints_every_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has all rules at a target; `--out` keeps the labels; a key stops nothing."""
    monkeypatch.setenv("VOUCHSAFE_API_KEYS", "somebody:secret")
    out = tmp_path / "labels.npz"
    command = ["bench", "certificates", "--images", "4", "--rows", "128", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    # 128 unanimous rows cannot prove 0.5, so that target is left out.
    assert set(told["at a target radius"]) == {"0.25"}
    figures = told["at a target radius"]["0.25"]
    assert set(figures) == set(RULES)
    assert figures["cohen"]["mean rows"] == figures["two-sided"]["mean rows"] == 228
    assert figures["anytime"]["mean rows"] < 228
    assert "art" not in told
    with np.load(out) as stored:
        assert stored["selection"].shape == (4, 100)
        assert stored["estimation"].shape == (4, 128)
    agreeing = told["unanimous images, target sigma"]
    assert agreeing["images"] >= 1
    assert agreeing["most rows"] == 80
    assert agreeing["http"]["seconds"]["median"] > 0
    assert agreeing["http"]["mean rows"] >= 80
    refused = CliRunner().invoke(app, [*command, "--sigma", "0.5"])
    assert refused.exit_code == 2
    assert "sigma = 0.25: must be 0.5" in refused.output


def test_art_is_requested_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ART the command ends before it labels a row."""
    monkeypatch.setattr(bench_certificates, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "certificates", "--art"])
    assert result.exit_code == 2
    assert "adversarial-robustness-toolbox" in result.output


@pytest.mark.skipif(find_spec("art") is None, reason="IBM ART, the extra bench, is not installed")
def test_art_certifies_the_same_networks() -> None:
    """A clear image has its label, and a radius that 100 rows can prove."""
    printed, mib = measured(["-m", "service.cli.bench.art", str(SLICE), "2", "0.25", "100"], {})
    _, (label, radius, seconds) = json.loads(printed.splitlines()[-1])
    assert label == evaluation_slice(SLICE).labels[1]
    assert 0 < radius <= certified_radius(clopper_pearson_lower(100, 100, 0.001), 0.25) + 1e-9
    assert seconds > 0
    assert mib > 100


def test_figures_of_known_labels() -> None:
    """Of a unanimous, a clear, a split and a wrongly labeled image, counts and rows are known."""
    estimation = np.zeros((4, 10_000), np.int16)
    estimation[1, ::10] = 1
    estimation[2, ::2] = 1
    labels = RowLabels(np.zeros((4, 100), np.int16), estimation, 0.25, "")
    data = LabelledImages(np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 0, 0, 1]), CIFAR10_LABELS)
    figures = by_rule(labels, data, QUESTION.aiming_at(0.25))
    for name in RULES:
        assert figures[name]["certified"] == figures[name]["of those of two-sided"] == 3
        assert figures[name]["certified and right"] == 2
    assert figures["two-sided"]["times fewer rows"] == 1.0
    ratio = 10_100 / figures["anytime"]["mean rows"]
    assert ratio > 12
    assert figures["anytime"]["times fewer rows"] == pytest.approx(ratio, abs=0.01)
    assert unanimous(labels) == [0, 3]
    loss = shortfall(labels, QUESTION)
    assert loss["images"] == 3
    assert 0 < loss["mean"] <= loss["largest"] < 0.005
