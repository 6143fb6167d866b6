"""`vouchsafe bench`: what it compares is comparable, and what it prints is whole."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from models.bundle import DEFAULT_TASK, read_bundle
from models.smoothing import Rows, load, votes
from service.bench import _plain, plain_loop
from service.cli import app

SHIP = Path(__file__).parents[1] / "docs" / "ship.png"


def test_the_plain_loop_is_short_and_votes_as_the_service_does() -> None:
    """At most 25 lines, and on the same image much the same votes, for it is the same network."""
    assert len(inspect.getsource(plain_loop).splitlines()) <= 25
    bundle = read_bundle(DEFAULT_TASK)
    pixels = np.asarray(Image.open(SHIP).convert("RGB"))
    plain = _plain(bundle, pixels, 192)().numpy()
    image = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    served = votes(load(bundle), Rows(image, b"bench/tests/noise", 0, 192, 0.25))
    assert plain.sum() == served.sum() == 192
    assert np.abs(plain - served).max() < 24


def test_bench_prints_the_loop_and_every_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report holds the loop's source, all five ways, their ratios, latencies and memory."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "--n", "28", "--requests", "2"])
    source, _, printed = result.stdout.partition("\n{\n")
    assert source.startswith("def plain_loop(")
    told = json.loads("{" + printed)
    ways = ["plain loop", "engine", *(f"http, {c} at once" for c in (1, 4, 16))]
    assert list(told["rows/s"]) == ways
    assert all(speed > 0 for speed in told["rows/s"].values())
    speeds = told["rows/s"]
    assert told["engine / plain loop"] == pytest.approx(
        speeds["engine"] / speeds["plain loop"], rel=0.01
    )
    assert set(told["http / engine"]) == set(told["latency, seconds"]) == set(ways[2:])
    assert 0 < told["share of the engine's time outside the networks"] < 1
    assert told["peak memory, MiB"]["n=280"] >= told["peak memory, MiB"]["n=28"] > 0
    assert list(tmp_path.iterdir()) == []
