"""Runtimes against eager float32: the same networks, the same answers but for rounding."""

from __future__ import annotations

import asyncio
import builtins
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.bundle import DEFAULT_TASK, read_bundle
from models.classifiers.open_clip import load_open_clip
from models.denoisers.super_resolution import load_super_resolution
from models.rows import Rows
from models.runtime import (
    AUTO,
    RUNTIMES,
    Network,
    OpenVino,
    RuntimeUnavailable,
    automatic,
    cpu_kind,
    numerics_of,
)
from models.smoothing import SmoothedModel, best_dtype, tried_runtime
from service.config import Settings
from service.processes.runtime import WorkerRuntime
from service.worker.model import ModelUnavailable
from tests.support import miniatures

CPU = torch.device("cpu")
ROWS = 8
computes_bf16 = pytest.mark.skipif(
    best_dtype(CPU) != torch.bfloat16, reason="needs a CPU that computes in bfloat16 (AVX512-BF16)"
)
EVERY = [pytest.param(name, marks=computes_bf16) for name in RUNTIMES]


def smoothed(folder: Path, name: str, dtype: torch.dtype) -> SmoothedModel:
    """The miniature networks under a runtime."""
    runtime = RUNTIMES[name]()
    weights = runtime.weights_dtype(CPU, dtype)
    denoiser = load_super_resolution(
        miniatures.save_super_resolution(folder / "unet"),
        miniatures.states(), 1.8, CPU, weights, runtime,
    )  # fmt: skip
    classifier = load_open_clip(
        miniatures.save_open_clip(folder / "head"),
        miniatures.LABELS, "a {}", CPU, weights, runtime,
    )  # fmt: skip
    return SmoothedModel(denoiser, classifier, numerics_of(CPU, dtype, ROWS, runtime.name), CPU)


def part(seed: int, start: int, stop: int) -> Rows:
    """Rows around a random image of 32x32 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 32, 32), np.uint8)
    return Rows(pixels, bytes([seed]) * 32, start, stop, 0.25)


@pytest.mark.parametrize("name", EVERY)
def test_a_runtime_computes_what_eager_float32_computes(name: str, tmp_path: Path) -> None:
    """Denoised pixels differ from float32's by bfloat16's rounding and no more."""
    exact = smoothed(tmp_path / "exact", "torch", torch.float32)
    other = smoothed(tmp_path / "other", name, torch.bfloat16)
    with torch.inference_mode():
        x_hat, sigma = exact.noisy([part(1, 0, ROWS)])
        wanted, told = exact.denoiser(x_hat, sigma), other.denoiser(x_hat, sigma)
        assert (wanted - told).abs().mean() < 0.01
        gap = (exact.classifier(wanted) - other.classifier(wanted)).abs().max()
    assert gap < 0.5  # Logits reach 14; a wrong layout or prompt moves them by whole units.


@pytest.mark.parametrize("name", EVERY)
def test_a_row_depends_on_neither_place_nor_companions(name: str, tmp_path: Path) -> None:
    """The same rows elsewhere in the batch, beside another image, have the same bits."""
    model = smoothed(tmp_path, name, torch.bfloat16)
    with torch.inference_mode():
        first = model.classifier(model.denoiser(*model.noisy([part(1, 0, 3), part(2, 0, 5)])))
        second = model.classifier(model.denoiser(*model.noisy([part(3, 0, 5), part(1, 0, 3)])))
    assert torch.equal(first[:3], second[5:])


def test_openvino_names_what_it_cannot_do() -> None:
    """float32 and other devices are refused with what is possible."""
    for device, dtype, where in (
        (CPU, torch.float32, "float32 on .* AVX"),
        (torch.device("cuda"), torch.bfloat16, "bfloat16 on cuda"),
    ):
        with pytest.raises(RuntimeUnavailable, match=f"with AVX512-BF16, not in {where}"):
            OpenVino().weights_dtype(device, dtype)


def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the error says how to get it."""
    importing = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.split(".")[0] == "openvino":
            raise ModuleNotFoundError(name)
        return importing(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeUnavailable, match="pip install openvino"):
        OpenVino()


def test_auto_takes_openvino_where_it_computes_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither another CPU, nor a GPU, nor a missing package keeps the service from starting."""
    monkeypatch.setattr("models.runtime.computes_bfloat16", lambda: True)
    chosen, why = automatic(CPU, torch.bfloat16)
    assert (chosen.name, why) == (OpenVino().name, "this CPU computes in bfloat16")
    chosen, why = automatic(torch.device("cuda"), torch.bfloat16)
    assert (chosen.name, "bfloat16 on cuda" in why) == ("torch", True)
    monkeypatch.setitem(sys.modules, "openvino", None)
    chosen, why = automatic(CPU, torch.bfloat16)
    assert (chosen.name, "not installed" in why) == ("torch", True)
    monkeypatch.setattr("models.runtime.computes_bfloat16", lambda: False)
    chosen, why = automatic(CPU, torch.float32)
    assert (chosen.name, "float32 on" in why) == ("torch", True)


def serving_by(runtime: str, folder: Path) -> WorkerRuntime:
    return WorkerRuntime(Settings.model_validate({"data_dir": folder, "runtime": runtime}))


def test_auto_serves_under_the_digest_of_what_it_chose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if it had been set by hand."""
    caplog.set_level("INFO", "vouchsafe")
    served = serving_by(AUTO, tmp_path).models["default"]
    by_hand = served.numerics.runtime.split()[0]
    assert served.digest == serving_by(by_hand, tmp_path).models["default"].digest
    assert [each.message.startswith(f"networks run by {by_hand}") for each in caplog.records] == [
        True
    ]


class Broken:
    """Imports, and converts nothing."""

    name = "broken 1.0"

    def weights_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def prepare(self, network: nn.Module) -> Network:
        def run(*inputs: Tensor) -> Tensor:
            raise RuntimeError("no conversion rule")

        return run


async def test_auto_falls_back_to_torch_for_networks_that_do_not_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch serves the default task, under its own digest; one that was set by hand fails."""
    monkeypatch.setattr("models.smoothing.automatic", lambda device, dtype: (Broken(), "it is"))
    monkeypatch.setitem(RUNTIMES, "openvino", Broken)
    fallen, failed = serving_by(AUTO, tmp_path), serving_by("openvino", tmp_path)
    assert fallen.models["default"].digest == failed.models["default"].digest
    await fallen.load_default(asyncio.Event())
    assert fallen.models["default"].is_loaded
    assert fallen.models["default"].digest == serving_by("torch", tmp_path).models["default"].digest
    reason = "broken 1.0 cannot run task default: RuntimeError: no conversion rule"
    assert f"networks run by torch: {reason}" in caplog.messages
    with pytest.raises(ModelUnavailable, match="RuntimeError"):
        await failed.load_default(asyncio.Event())
    assert tried_runtime(AUTO, read_bundle(DEFAULT_TASK)).name == "torch"
    for serving in (fallen, failed):
        serving.thread.close()


def test_the_digest_tells_what_the_bits_depend_on() -> None:
    """Another runtime or number of threads is another served digest, so another noise key."""
    bundle = read_bundle(DEFAULT_TASK)
    eager = numerics_of(CPU, torch.bfloat16, ROWS)
    others = [
        replace(eager, runtime=OpenVino().name),
        replace(eager, threads=eager.threads + 1),
        replace(eager, device="another CPU"),
    ]
    digests = [bundle.served_digest(numerics.described()) for numerics in (eager, *others)]
    assert len(set(digests)) == len(digests)
    assert eager.threads == torch.get_num_threads()
    assert eager.device == cpu_kind()


def test_settings_know_every_runtime() -> None:
    """VOUCHSAFE_RUNTIME takes the runtimes that there are, and `auto`, its default."""
    annotation = Settings.model_fields["runtime"].annotation
    assert set(get_args(annotation)) == {AUTO, *RUNTIMES}
    assert Settings.model_fields["runtime"].default == AUTO
