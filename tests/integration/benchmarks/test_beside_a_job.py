"""What a job costs is measured while a job runs, and told whole; the fake adaptation stands in."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import adapt_cost, beside_a_job
from benchmarks.server import serving
from models.adaptation.plan import STAGES
from tests.support.adapting import FAKE
from tests.support.task_service import adapting, body

SERVER = (sys.executable, "-m", "tests.support.fake_server")


def test_questions_are_asked_with_and_without_a_job_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage has its questions, and each block its latencies; the table says the same."""
    monkeypatch.setattr(beside_a_job, "serving", partial(serving, command=SERVER))
    monkeypatch.setattr(beside_a_job, "NAME", "slower")
    options = ["--labels", "cat,dog", "--shots", "1", "--n", "20", "--requests", "4"]
    beside_a_job.main([*options, "--out", str(tmp_path / "told.json")])
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["question"] == {"mode": "predict", "sigma": "0.25", "n": "20"}
    assert told["task"] == {"labels": ["cat", "dog"], "shots": 1}
    assert told["before"]["requests"] == told["after"]["requests"] == 4
    assert told["nothing beside it"]["requests"] == 8
    beside = told["beside a job"]
    assert beside["requests"] == sum(told[stage]["requests"] for stage in STAGES) >= 4
    assert all(told[name]["p50"] <= told[name]["p99"] for name in ("before", "after", *STAGES))
    alone = told["nothing beside it"]
    assert told["ratio"]["p50"] == pytest.approx(beside["p50"] / alone["p50"], abs=0.01)
    printed = capsys.readouterr().out.splitlines()
    assert f"| beside a job | {beside['requests']} | {beside['p50']} |" in printed[3]
    assert len(printed) == 2 + 2 + len(STAGES) + 1


async def test_stages_that_are_left_out_have_no_share(tmp_path: Path) -> None:
    """A job without personalization and fine-tuning is asked beside in its other stages."""

    async def ask(image: bytes) -> None:
        assert image == b"picture"

    async with adapting(tmp_path) as service:
        task = body("slow", steps=0, epochs=0)
        asked = await beside_a_job._beside_jobs(service.client, ask, b"picture", task, 4)
    assert {stage for stage, _ in asked} <= {"synthesizing", "evaluating"}
    assert len(asked) >= 4


async def test_a_job_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    """A job that ends without a task gives no figures, but its problem."""

    async def ask(image: bytes) -> None:
        assert image == b"picture"

    async with adapting(tmp_path) as service:
        with pytest.raises(RuntimeError, match=r"the adaptation failed: .* lower steps"):
            await beside_a_job._beside_jobs(service.client, ask, b"picture", body("fail"), 1)


def test_the_cost_of_a_job_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its UNets computed in, every stage's seconds, which make up the whole, and the memory; a
    failure is no figure."""
    monkeypatch.setattr("service.tasks.process.JOB", FAKE)
    monkeypatch.setattr(adapt_cost, "NAME", "slow")
    adapt_cost.main(["--labels", "cat,dog", "--shots", "1", "--out", str(tmp_path / "told.json")])
    told = json.loads((tmp_path / "told.json").read_text())
    assert json.loads(capsys.readouterr().out) == told
    assert told["dtype"] == "float16"
    seconds = told["seconds"]
    assert list(seconds) == ["starting", *STAGES, "whole"]
    assert all(0.9 < seconds[stage] < 3 for stage in STAGES)
    assert sum(seconds.values()) == pytest.approx(2 * seconds["whole"], abs=0.3)
    assert told["peak memory of the job's largest process, MiB"] > 20
    monkeypatch.setattr(adapt_cost, "NAME", "fail")
    with pytest.raises(RuntimeError, match="lower steps"):
        adapt_cost.main(["--labels", "cat,dog", "--shots", "1"])
