"""Speed of denoise-and-classify at IF-II-L's size, with random weights.

`python -m benchmarks.gpu --device cuda --out FILE.json` measures one machine's ceilings and rows/s
over batch sizes for every variant of large_networks.py. With the fastest variant it measures
PREDICT and CERTIFY, beside the paper's figures. FILE is written after every measurement, with the
reason for each that failed. `--miniature` does the same with small networks, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.large_networks import (
    CHECKED,
    KEY,
    SIGMA,
    VARIANTS,
    Networks,
    Variant,
    full_size,
    miniature,
    operations,
    pictures,
)
from benchmarks.machine import REPEATS, ceilings, machine, seconds
from models.rows import Rows
from models.smoothing import SmoothedModel, votes

BATCHES = (10, 20, 25, 50, 64, 100, 200)
"""Most of them divide PREDICT's 100 rows, which then need no padding; 64 is the service's own."""

PAPER = {"PREDICT, seconds": 1.39, "CERTIFY, seconds": 129, "rows/s": 78, "GPUs": "4 x A100"}
WANTED = {"rows/s": 78, "share of the bf16 matmul ceiling": 0.55, "times fp32": 3}
PREDICT_ROWS, SELECTION_ROWS = 100, 100
LEAST_SECONDS = 1.0
"""A batch is timed again until its times add up to this."""

GAIN, PATIENCE = 1.01, 2
"""A sweep ends after this many batch sizes in a row that were not faster by this factor."""

ALIKE = 0.5
"""A variant with fewer of fp32's labels is wrong and never the fastest; rounding costs a tenth."""

KEPT_FOR_QUESTIONS = 0.4
"""Largest share of the time that variants leave to PREDICT and CERTIFY."""

SLOW_START = 100.0
"""Variants that need more seconds to start are measured after PREDICT and CERTIFY."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: batch sizes and CERTIFY's `n`, and for the ceilings sides of square
    matrices and MiB copied; in `seconds` altogether."""

    batches: tuple[int, ...]
    n: int
    matrices: tuple[int, ...]
    copied: int
    seconds: float


class Bench:
    """Measurements in `report`; `save` is called after each addition."""

    def __init__(
        self, networks: Networks, plan: Plan, flops: int, save: Callable[[dict[str, Any]], None]
    ) -> None:
        self._networks = networks
        self._plan = plan
        self._flops = flops
        self._save = save
        self._device = networks.device
        self._ends = time.perf_counter() + plan.seconds
        self._pictures = pictures(networks.resolution)
        self._reference: NDArray[np.int64] | None = None
        self._ceiling: float | None = None
        self._best: tuple[Variant, dict[str, Any]] | None = None
        self.report: dict[str, Any] = {
            "machine": machine(self._device),
            "resolution": networks.resolution,
            "sigma": SIGMA,
            "parameters": networks.parameters(),
            "GFLOP a row": round(flops / 1e9, 3),
            "ceilings": {},
            "variants": {},
            "questions": [],
        }

    def run(self, variants: Sequence[Variant]) -> None:
        """The ceilings, every variant, and the questions: before those that are slow to start and,
        should one of them be the fastest, after them again."""
        plan = self._plan
        measured = self._tried(partial(ceilings, plan.matrices, plan.copied, self._device))
        self.report["ceilings"] = measured
        if "skipped" not in measured:
            self._ceiling = max(measured["bf16 matmul, TFLOP/s"].values())
        self._networks.centre()
        for slow in (False, True):
            before = self._best
            for variant in variants:
                if slow == (variant.start_seconds > SLOW_START):
                    self._sweep(variant)
            if self._best and self._best is not before:
                self.report["questions"].append(self._asked(*self._best))
                self._save(self.report)
        if self._best:
            self.report["beside what was wanted"] = self._beside_wanted(*self._best)
        self.report["seconds left"] = round(self._left(), 1)
        self._save(self.report)

    def _sweep(self, variant: Variant) -> None:
        """Batch sizes upwards until one fails, time runs short or speed has stopped growing; a
        variant that has to be compiled has one, the fastest so far."""
        points = self.report["variants"][variant.name] = []
        sizes = self._plan.batches
        if variant.start_seconds and self._best:
            sizes = (self._best[1]["rows"],)
        fastest, patience = 0.0, PATIENCE
        for rows in sizes:
            needed = variant.start_seconds
            if fastest:
                needed += (max(rows, CHECKED) + (REPEATS + 1) * rows) / fastest
            left = self._left() - self._for_questions()
            if needed >= left:
                why = f"needs about {needed:.0f} s; {left:.0f} are left beside the questions"
                point: dict[str, Any] = {"skipped": why}
            else:
                point = self._tried(partial(self._point, variant, rows))
            points.append({"rows": rows, **point})
            self._save(self.report)
            if "skipped" in point:
                return
            speed, alike = point["rows/s"], point["labels as fp32's"]
            if (alike is None or alike >= ALIKE) and speed > self._best_speed():
                self._best = (variant, points[-1])
            patience = PATIENCE if speed > GAIN * fastest else patience - 1
            fastest = max(fastest, speed)
            if not patience:
                return

    def _point(self, variant: Variant, rows: int) -> dict[str, Any]:
        """One variant at one batch size: the service's path, from noise to labels."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = self._networks.smoothed(variant, rows)
        batch = [Rows(self._pictures[0].pixels, KEY, 0, rows, SIGMA)]
        run = partial(model.labels, batch)
        first = seconds(run, self._device)
        labels = np.concatenate(
            [model.labels(self._pictures[i : i + rows]) for i in range(0, CHECKED, rows)]
        )
        if variant.dtype == torch.float32 and self._reference is None:
            self._reference = labels
        taken = [seconds(run, self._device) for _ in range(REPEATS)]
        while sum(taken) < LEAST_SECONDS:
            taken.append(seconds(run, self._device))
        noise = [seconds(partial(model.noisy, batch), self._device) for _ in taken]
        whole, speed = float(np.median(taken)), rows / float(np.median(taken))
        teraflops = speed * self._flops / 1e12
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._device.type == "cuda" else None
        return {
            "rows/s": round(speed, 2),
            "slowest and fastest": [round(rows / max(taken), 2), round(rows / min(taken), 2)],
            "TFLOP/s": round(teraflops, 3),
            "share of the bf16 matmul ceiling": (
                round(teraflops / self._ceiling, 4) if self._ceiling else None
            ),
            "share of noise": round(float(np.median(noise)) / whole, 4),
            "peak memory, GiB": round(peak, 2) if peak else None,
            "first call, seconds": round(first, 2),
            "labels as fp32's": (
                float((labels == self._reference).mean()) if self._reference is not None else None
            ),
            "labels seen": len(set(labels.tolist())),
        }

    def _asked(self, variant: Variant, point: dict[str, Any]) -> dict[str, Any]:
        """PREDICT and CERTIFY, every row of them, or why there are none."""
        total = SELECTION_ROWS + self._plan.n
        needed = point["first call, seconds"] + total / point["rows/s"]
        if needed >= self._left():
            result = {"skipped": f"CERTIFY needs about {needed:.0f} s; {self._left():.0f} are left"}
        else:
            result = self._tried(partial(self._questions, variant, point["rows"]))
        return {"variant": variant.name, "rows": point["rows"], **result, "the paper": PAPER}

    def _questions(self, variant: Variant, rows: int) -> dict[str, Any]:
        model = self._networks.smoothed(variant, rows)

        def certify() -> None:
            self._count(model, b"benchmark/select" * 2, SELECTION_ROWS)
            self._count(model, KEY, self._plan.n)

        predict = partial(self._count, model, KEY, PREDICT_ROWS)
        predict()
        predicting = [seconds(predict, self._device) for _ in range(REPEATS)]
        certifying = seconds(certify, self._device)
        return {
            f"PREDICT n={PREDICT_ROWS}, seconds": round(float(np.median(predicting)), 3),
            f"CERTIFY n0={SELECTION_ROWS} n={self._plan.n}, seconds, once": round(certifying, 2),
            "rows/s of CERTIFY": round((SELECTION_ROWS + self._plan.n) / certifying, 2),
        }

    def _count(self, model: SmoothedModel, key: bytes, n: int) -> None:
        counts = votes(model, Rows(self._pictures[0].pixels, key, 0, n, SIGMA))
        if counts.sum() != n:
            raise RuntimeError(f"{counts.sum()} votes for {n} rows")

    def _beside_wanted(self, variant: Variant, point: dict[str, Any]) -> dict[str, Any]:
        fp32 = max((p.get("rows/s", 0) for p in self.report["variants"].get("fp32", [])), default=0)
        found = {**point, "times fp32": round(point["rows/s"] / fp32, 2) if fp32 else None}
        beside = {name: {"measured": found[name], "wanted": WANTED[name]} for name in WANTED}
        return {"variant": variant.name, "rows": point["rows"], **beside}

    def _tried(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured, or why it was not: a failure must not lose what came before it."""
        try:
            if self._device.type == "cuda":
                gc.collect()
                torch.compiler.reset()
                torch.cuda.empty_cache()
            return measure()
        except Exception as error:
            return {"skipped": reason(error)}

    def _best_speed(self) -> float:
        return float(self._best[1]["rows/s"]) if self._best else 0.0

    def _left(self) -> float:
        return self._ends - time.perf_counter()

    def _for_questions(self) -> float:
        """Seconds that PREDICT and CERTIFY will need by the figures so far; 0 once done."""
        if self._best is None or self.report["questions"]:
            return 0.0
        needed = 10 + (5 * PREDICT_ROWS + self._plan.n) / self._best_speed()
        return min(needed, KEPT_FOR_QUESTIONS * self._plan.seconds)


def reason(error: Exception) -> str:
    """The kind of an error and its first line."""
    kind = type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        kind = "out of memory"
    return f"{kind}: {(str(error).strip() or 'no message').splitlines()[0]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0, help="all of it, but for imports")
    parser.add_argument("--batches", type=int, nargs="+")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names)
    parser.add_argument("--miniature", action="store_true")
    options = parser.parse_args(arguments)

    def save(report: dict[str, Any]) -> None:
        partly = options.out.with_suffix(".part")
        partly.write_text(json.dumps(report, indent=2) + "\n")
        partly.replace(options.out)

    began, device = time.perf_counter(), torch.device(options.device)
    try:
        shape = miniature() if options.miniature else full_size()
        networks, flops = Networks(shape, device), operations(shape)
    except Exception as error:
        save({"skipped": reason(error)})
        raise SystemExit(f"nothing was measured: {reason(error)}") from error
    sizes = tuple(options.batches or ((5, 10) if options.miniature else BATCHES))
    n, matrices, copied = (
        (100, (128, 256), 4) if options.miniature else (10_000, (8192, 16384), 4096)
    )
    plan = Plan(sizes, n, matrices, copied, options.seconds - (time.perf_counter() - began))
    bench = Bench(networks, plan, flops, save)
    bench.run([variant for variant in VARIANTS if variant.name in options.variants])
    print(json.dumps(bench.report, indent=2))


if __name__ == "__main__":
    main()
