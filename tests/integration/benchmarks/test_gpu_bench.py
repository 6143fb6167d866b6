"""`python -m benchmarks.gpu`: measures what it says, sees what is wrong, loses nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.gpu import Bench, Plan, main
from benchmarks.large_networks import (
    VARIANTS,
    Graphed,
    Networks,
    Variant,
    full_size,
    miniature,
    operations,
)
from models.rows import Rows
from models.runtime import Network, Torch
from models.smoothing import SmoothedModel

CPU = torch.device("cpu")
FP32, BF16 = VARIANTS[:2]
PLAN = Plan(batches=(5, 10), n=20, matrices=(32,), copied=1, seconds=100.0)
OPERATIONS = 10**9


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)


def measured(variants: Sequence[Variant], **changed: Any) -> dict[str, Any]:
    """The last report that was saved of a bench of miniatures."""
    saved: list[str] = []
    networks, plan = Networks(miniature(), CPU), replace(PLAN, **changed)
    Bench(networks, plan, OPERATIONS, lambda told: saved.append(json.dumps(told))).run(variants)
    report: dict[str, Any] = json.loads(saved[-1])
    return report


def test_a_run_measures_every_variant_that_a_cpu_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command writes ceilings, every variant's speed or why it has none, and both questions."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    out = tmp_path / "gpu.json"
    main(["--device", "cpu", "--miniature", "--batches", "10", "--out", str(out)])
    report = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert set(report["variants"]) == {variant.name for variant in VARIANTS}
    for variant in VARIANTS:
        (point,) = report["variants"][variant.name]
        if variant.runtime is Graphed:
            assert "CUDA graphs need a CUDA device" in point["skipped"]
        else:
            assert point["rows/s"] > 0
            assert 0 < point["share of noise"] < 1
            assert point["labels seen"] > 5
            assert point["labels as fp32's"] >= 0.75
    assert all(speed > 0 for speed in report["ceilings"]["bf16 matmul, TFLOP/s"].values())
    asked = report["questions"][-1]
    assert asked["PREDICT n=100, seconds"] > 0
    assert asked["rows/s of CERTIFY"] > 0
    assert report["beside what was wanted"]["times fp32"]["measured"] >= 1


def test_shares_are_of_the_measured_ceiling() -> None:
    """Speed times operations a row, over the fastest matrix product of the same report."""
    report = measured([FP32])
    (ceiling,) = report["ceilings"]["bf16 matmul, TFLOP/s"].values()
    for point in report["variants"]["fp32"]:
        share = point["rows/s"] * OPERATIONS / (ceiling * 1e12)
        assert point["share of the bf16 matmul ceiling"] == pytest.approx(share, rel=0.05)


def test_full_size_is_if_ii_l_s() -> None:
    """1.2 billion parameters as its card says, CLIP ViT-B/32's 87.8 million, four teraflops."""
    shape = full_size()
    parameters = Networks(shape, torch.device("meta")).parameters()
    assert round(parameters["denoiser"] / 1e9, 1) == 1.2
    assert parameters["classifier"] == 87_849_216
    assert 3.9e12 < operations(shape) < 4.1e12


def test_out_of_memory_ends_a_sweep_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The larger batch is skipped with the reason, smaller ones and other variants are kept."""
    labels = SmoothedModel.labels

    def scarce(model: SmoothedModel, parts: Sequence[Rows]) -> Any:
        if model.batch_rows > 5:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return labels(model, parts)

    monkeypatch.setattr(SmoothedModel, "labels", scarce)
    report = measured([FP32, BF16])
    for name in ("fp32", "bf16"):
        small, large = report["variants"][name]
        assert small["rows/s"] > 0
        assert large == {"rows": 10, "skipped": "out of memory: tried to allocate 1 GiB"}
    assert report["questions"][-1]["rows"] == 5


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile fails at the first call; the report says how and the rest is measured."""

    def compiled(network: nn.Module, **_: Any) -> Network:
        def fail(*inputs: Tensor) -> Tensor:
            raise RuntimeError("no compiler found\nlook here")

        return fail

    monkeypatch.setattr(torch, "compile", compiled)
    compiled_one = [variant for variant in VARIANTS if variant.name == "compile"]
    report = measured([FP32, *compiled_one], batches=(10,))
    assert report["variants"]["compile"][0]["skipped"] == "RuntimeError: no compiler found"
    assert report["beside what was wanted"]["variant"] == "fp32"


def test_a_fast_but_wrong_variant_is_seen_and_never_the_fastest() -> None:
    """One that answers every batch as its first has few of fp32's labels and is not chosen."""

    class Stale(Torch):
        def prepare(self, network: nn.Module) -> Network:
            held: list[Tensor] = []

            def first(*inputs: Tensor) -> Tensor:
                if not held:
                    held.append(network(*inputs))
                return held[0]

            return first

    report = measured([FP32, Variant("stale", Stale)], batches=(8,))
    (wrong,), (right,) = report["variants"]["stale"], report["variants"]["fp32"]
    assert wrong["rows/s"] > right["rows/s"]
    assert wrong["labels as fp32's"] < gpu.ALIKE
    assert report["beside what was wanted"]["variant"] == "fp32"


def test_time_that_runs_out_is_a_reason() -> None:
    """Without time nothing is measured but the ceilings, and the report is whole."""
    report = measured([FP32, BF16], seconds=0.0)
    for name in ("fp32", "bf16"):
        (point,) = report["variants"][name]
        assert "are left" in point["skipped"]
    assert report["ceilings"]
    assert report["questions"] == []


def test_time_is_kept_for_the_questions() -> None:
    """A variant that would take the time that CERTIFY needs is skipped, and CERTIFY is asked."""
    slow = Variant("slow to start", start_seconds=90.0)
    report = measured([FP32, slow], batches=(10,))
    assert "beside the questions" in report["variants"]["slow to start"][0]["skipped"]
    assert report["questions"][-1]["rows/s of CERTIFY"] > 0


def test_a_sweep_ends_where_speed_stops_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batch sizes in a row that are no faster are the last."""
    (point,) = measured([FP32], batches=(10,))["variants"]["fp32"]
    del point["rows"]
    monkeypatch.setattr(Bench, "_point", lambda bench, variant, rows: point)
    report = measured([FP32], batches=(10, 11, 12, 13))
    assert [point["rows"] for point in report["variants"]["fp32"]] == [10, 11, 12]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_a_reason(tmp_path: Path) -> None:
    """The file says why nothing was measured, and the command fails."""
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="nothing was measured"):
        main(["--device", "cuda", "--miniature", "--out", str(out)])
    assert json.loads(out.read_text())["skipped"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_graph_answers_for_the_inputs_it_is_given() -> None:
    """A replay equals the network itself on inputs other than those it was recorded with."""
    torch.manual_seed(0)
    network = nn.Linear(8, 8).cuda()
    graph = Graphed().prepare(network)
    with torch.inference_mode():
        for _ in range(3):
            x = torch.randn(4, 8, device="cuda")
            torch.testing.assert_close(graph(x), network(x))
