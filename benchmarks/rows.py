"""Rows per second of the default task, and where they go: `make bench`.

Everything is measured in one process, one run after another, and compared as ratios.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from models.bundle import DEFAULT_TASK, read_bundle
from models.noise import discrete_gaussian
from models.smoothing import Rows, SmoothedModel, load, votes

SIGMA = 0.25


def plain_loop(model: SmoothedModel, pixels: np.ndarray, rows: int) -> torch.Tensor:
    """What a researcher would write: float32, eager, torch.randn, batches of 64."""
    x = torch.tensor(pixels).float() / 255
    counts = torch.zeros(model.classes, dtype=torch.long)
    sigma = torch.full((64,), SIGMA, dtype=torch.float64)
    with torch.inference_mode():
        for start in range(0, rows, 64):
            x_hat = x + SIGMA * torch.randn(64, *x.shape)
            labels = model.classifier(model.denoiser(x_hat, sigma)).argmax(1)
            counts += torch.bincount(labels[: rows - start], minlength=model.classes)
    return counts


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall seconds of a call, after one to warm up."""
    function()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows, bundle = arguments.rows, read_bundle(DEFAULT_TASK)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    plain = load(bundle, dtype=torch.float32)
    served = load(bundle)
    question = Rows(pixels, b"benchmark/noise/", 0, rows, SIGMA)
    loop = seconds(lambda: plain_loop(plain, pixels, rows), arguments.repeats)
    engine = seconds(lambda: votes(served, question), arguments.repeats)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    noise = seconds(
        lambda: discrete_gaussian(question.key, 0, rows, (3, 32, 32), SIGMA), arguments.repeats
    )
    print(inspect.getsource(plain_loop))
    figures = {
        "rows": rows,
        "threads": threads,
        "numerics": served.numerics.described(),
        "plain loop, rows/s": round(rows / loop, 1),
        "smoothing.votes, rows/s": round(rows / engine, 1),
        "ratio": round(loop / engine, 3),
        "noise on one thread, seconds": round(noise, 4),
        "noise on one thread, share of smoothing.votes": round(noise / engine, 4),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
