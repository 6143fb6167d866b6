"""Counts of what tasks answer about pictures that show none of their labels.

`python -m benchmarks.choosing_labels --work FOLDER`

The tasks are of two labels, of two with a catch-all label, both made in FOLDER with nothing
adapted, and the built-in one. Pictures are those of the shipped slice by class, white noise, and
flat gray. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.adaptation import adapted
from models.adaptation.plan import Plan
from models.bundle import DEFAULT_TASK, Bundle, read_bundle
from models.evaluation.datasets.cifar10 import SLICE, LabelledImages, evaluation_slice
from models.evaluation.tables import image_votes, outcome
from models.smoothing import SmoothedModel, load

SHOWN = ("cat", "dog", "ship", "frog")
"""Classes of the slice whose pictures are asked about."""
TASKS = {
    "task of cat and dog": ("cat", "dog"),
    "with a catch-all label": ("cat", "dog", ("other", "something else")),
}


def pictures(each: int) -> dict[str, np.ndarray]:
    """Images (N,32,32,3) uint8 by what they show."""
    data, generator = evaluation_slice(SLICE), np.random.default_rng(0)
    found = {name: data.only((name,)).images[:each] for name in SHOWN}
    found["white noise"] = generator.integers(0, 256, (each, 32, 32, 3), np.uint8)
    levels = np.linspace(0, 255, each).astype(np.uint8)
    found["one gray"] = np.broadcast_to(levels[:, None, None, None], (each, 32, 32, 3))
    return found


def answers(
    model: SmoothedModel,
    labels: tuple[str, ...],
    images: np.ndarray,
    sigma: float,
    n0: int,
    n: int,
) -> tuple[Counter[str], float]:
    """Certified labels and abstentions, by count, and the median radius of the certified."""
    data = LabelledImages(images, np.zeros(len(images), np.int64), labels)
    said, radii = Counter[str](), []
    for index in range(len(data)):
        selection, estimation = image_votes(model, data, index, sigma, n0, n, seed=0)
        proven = outcome(data, index, selection, estimation, sigma, 0.001).two_sided
        said["abstains" if proven.label is None else labels[proven.label]] += 1
        radii += [] if proven.label is None else [proven.radius or 0.0]
    return said, float(np.median(radii)) if radii else 0.0


def main() -> None:
    """Print the table, a line for each kind of pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="make the tasks here")
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--n0", type=int, default=16)
    parser.add_argument("--n", type=int, default=200)
    arguments = parser.parse_args()
    bundles = {name: _made(words, arguments.work) for name, words in TASKS.items()}
    bundles["task of ten labels"] = read_bundle(DEFAULT_TASK)
    models = {name: load(bundle) for name, bundle in bundles.items()}
    print(f"| pictures | {' | '.join(bundles)} |\n{'|---' * (1 + len(bundles))}|")
    for shown, images in pictures(arguments.each).items():
        cells = [shown]
        for name, model in models.items():
            question = (arguments.sigma, arguments.n0, arguments.n)
            said, radius = answers(model, bundles[name].labels, images, *question)
            counts = ", ".join(f"{label} {count}" for label, count in said.most_common())
            cells.append(f"{counts}; {radius:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def _made(labels: tuple[str | tuple[str, str], ...], work: Path) -> Bundle:
    plan = Plan.checked(labels, shots=2, steps=0, epochs=0, allow_unknown_labels=True)
    return adapted(plan, work)[0]


if __name__ == "__main__":
    main()
