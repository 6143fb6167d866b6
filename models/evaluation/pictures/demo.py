"""Contact sheet of certified photographs: `make demo`."""

from __future__ import annotations

import argparse
from hashlib import sha256
from pathlib import Path

import numpy as np

from models.bundle import DEFAULT_TASK, read_bundle
from models.certificates.rules import certify
from models.evaluation.datasets.cifar10 import SLICE, evaluation_slice
from models.evaluation.pictures.sheets import Shown, contact_sheet, noisy_and_denoised
from models.noise import total_variation
from models.rows import Rows
from models.runtime import RUNTIMES
from models.smoothing import SmoothedModel, load, votes

N0, N, ALPHA = 100, 1000, 0.001


def shown(model: SmoothedModel, image: np.ndarray, truth: str, sigma: float, seed: bytes) -> Shown:
    """The image (H,W,3) uint8 with its certificate and pictures; its noise follows from `seed`."""
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1))
    labels = model.classifier.labels
    selection = votes(model, Rows(pixels, sha256(b"selection" + seed).digest(), 0, N0, sigma))
    rows = Rows(pixels, sha256(b"estimation" + seed).digest(), 0, N, sigma)
    estimation = votes(model, rows)
    certificate = certify(
        selection.tolist(), estimation.tolist(), sigma, ALPHA,
        method="cohen", total_variation=total_variation(sigma, pixels.shape),
    )  # fmt: skip
    first = Rows(pixels, rows.key, 0, 1, sigma)
    return Shown(
        truth,
        image / 255,
        *noisy_and_denoised(model, first),
        counts=dict(zip(labels, estimation.tolist(), strict=True)),
        label=None if certificate.label is None else labels[certificate.label],
        certificate=certificate,
    )


def main() -> None:
    """Certify photographs of the shipped slice of CIFAR-10's test set, the first of every class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=SLICE)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch")
    parser.add_argument("--out", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    data = evaluation_slice(arguments.images)
    model = load(read_bundle(DEFAULT_TASK), runtime=RUNTIMES[arguments.runtime]())
    found = []
    for label, name in enumerate(data.names):
        index = int(np.flatnonzero(data.labels == label)[0])
        found.append(
            shown(model, data.images[index], name, arguments.sigma, f"demo {index}".encode())
        )
        print(f"{name}: {found[-1].label or 'abstains'}, radius {found[-1].certificate.radius}")
    title = f"sigma {arguments.sigma:g}, n0 {N0}, n {N}, alpha {ALPHA:g}: green as named, red not"
    contact_sheet(found, title, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
