"""`vouchsafe bench`: what it compares is comparable, and what it prints is whole."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from models.bundle import DEFAULT_TASK, read_bundle
from models.noise import discrete_gaussian
from models.smoothing import load, votes
from service.cli.bench.plain_loop import loaded, plain_loop
from service.cli.bench.speed import SIGMA, _question
from service.cli.main import app


def test_the_plain_loop_is_short_and_computes_the_service_s_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 25 lines, and nearly the same votes on the same noise around a picture of nothing."""
    assert len(inspect.getsource(plain_loop).splitlines()) <= 25
    bundle = read_bundle(DEFAULT_TASK)
    model = load(bundle, dtype=torch.float32)
    question = _question(bundle.resolution, 128)
    rows = [
        discrete_gaussian(question.key, start, start + 64, (3, 32, 32), 0.25) / 255 / 0.25
        for start in (0, 64)
    ]
    loop = loaded(bundle, question.pixels.transpose(1, 2, 0), SIGMA, 128)
    monkeypatch.setattr(torch, "randn", lambda *shape: rows.pop(0))
    plain = loop().numpy()
    served = votes(model, question)
    assert plain.sum() == served.sum() == 128
    assert np.count_nonzero(served) > 1
    assert np.abs(plain - served).sum() <= 2


def test_bench_prints_the_loop_and_every_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report holds the loop's source, every way, their ratios, latencies and memory; callers'
    keys in the environment do not stop it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("service.cli.bench.speed.SELECTION_ROWS", 10)
    monkeypatch.setenv("VOUCHSAFE_API_KEYS", "somebody:secret")
    result = CliRunner().invoke(app, ["bench", "--n", "11", "--requests", "16"])
    assert result.exit_code == 0, result.output
    source, _, printed = result.stdout.partition("\n{\n")
    assert source.startswith("def plain_loop(")
    told = json.loads("{" + printed)
    over_http = [f"http, {c} at once" for c in (1, 4, 16)]
    assert set(told["rows/s"]) == {"plain loop", "smoothing.votes", "engine", *over_http}
    assert all(speed > 0 for speed in told["rows/s"].values())
    assert set(told["http / engine"]) == set(told["latency, seconds"]) == set(over_http)
    assert all(p["p50"] <= p["p99"] for p in told["latency, seconds"].values())
    assert 0 < told["share of the engine's time outside the networks"] < 1
    memory = told["peak memory of a process that certifies one image, MiB"]
    assert abs(memory["n=110"] - memory["n=11"]) < 200
    assert list(tmp_path.iterdir()) == []
