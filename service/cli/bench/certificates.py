"""Rows, seconds and memory of certificates by several rules on the same labels of noise rows."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from models.bundle import DEFAULT_TASK, read_bundle
from models.certificates.anytime import largest_target
from models.certificates.evidence import total_variation
from models.evaluation.datasets.cifar10 import SLICE, LabelledImages, evaluation_slice
from models.evaluation.row_labels import SELECTION_ROWS, RowLabels, label_rows
from models.evaluation.rules import RULES, Answer, Labels, Question, anytime, two_sided
from models.smoothing import load, tried_runtime
from service.cli.bench.speed import WAIT_SECONDS, measured, peak_mib, serving
from service.config import Settings
from service.processes.embedded import Embedded, leave_if_hung

ALPHA = 0.001
AGREEING_ROWS = 64
"""First estimation rows that agree in an image that is called unanimous."""

UNANIMOUS_ROWS = 80
"""Rows that prove sigma for a unanimous image: 16 to select, 64 to estimate."""

WARM_UP_ROWS = 100
ART_IMAGES = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """The first `images` of the shipped slice, at most `rows` estimation rows each; ART or not."""

    images: int
    rows: int
    sigma: float
    art: bool


def compare(plan: Plan, runtime: str, out: Path | None) -> dict[str, Any]:
    """The figures of the report; the labels of the rows are kept in `out` (.npz), if given.

    Raises ValueError for a file of other labels, and where ART is requested and not installed.
    """
    if plan.art and find_spec("art") is None:
        raise ValueError("--art needs adversarial-robustness-toolbox: install the extra bench")
    bundle, data = read_bundle(DEFAULT_TASK), evaluation_slice(SLICE)[: plan.images]
    with tempfile.TemporaryDirectory() as folder:
        path = out or Path(folder) / "labels.npz"
        model = load(bundle, runtime=tried_runtime(runtime, bundle))
        labeled = label_rows(model, data, plan.sigma, plan.rows, path)
        console = Console(stderr=True)
        *_, labels = track(
            labeled, "labeling", len(data), console=console, disable=not sys.stderr.isatty()
        )
    blur = total_variation((3, bundle.resolution, bundle.resolution), plan.sigma)
    most = largest_target(plan.rows, plan.sigma, ALPHA, blur)
    targets = [target for target in (plan.sigma, 2 * plan.sigma) if target <= most]
    asked = Question(plan.sigma, ALPHA, len(bundle.labels), blur)
    agreeing = unanimous(labels)
    return {
        "images": len(data),
        "rows": plan.rows,
        "sigma": plan.sigma,
        "alpha": ALPHA,
        "bundle": labels.digest,
        "numerics": model.numerics.described(),
        "at a target radius": {
            f"{target:g}": by_rule(labels, data, asked.aiming_at(target)) for target in targets
        },
        "radius without a target, below the two-sided rule's": shortfall(labels, asked),
        "unanimous images, target sigma": {
            "images": len(agreeing),
            "most rows": max((
                anytime(
                    asked.aiming_at(plan.sigma), labels.selection[i], labels.estimation[i]
                ).rows
                for i in agreeing
            ), default=0),
            "http": over_http(data, agreeing, plan.sigma, plan, runtime),
        },
        **({"art": beside_art(plan, data, targets, runtime)} if plan.art else {}),
    }  # fmt: skip


def by_rule(
    labels: RowLabels, data: LabelledImages, question: Question
) -> dict[str, dict[str, Any]]:
    """What every rule certifies at the question's target, and with how many rows."""
    target = question.target_radius or 0.0
    answers = {
        name: [rule(question, *rows) for rows in _pairs(labels)] for name, rule in RULES.items()
    }
    reached = {
        name: np.array([answer.reaches(target) for answer in each])
        for name, each in answers.items()
    }
    fixed = np.mean([answer.rows for answer in answers["two-sided"]])
    return {
        name: {
            "certified": int(reached[name].sum()),
            "certified and right": _right(each, data, target),
            "of those of two-sided": int((reached[name] & reached["two-sided"]).sum()),
            "mean rows": round(float(np.mean([answer.rows for answer in each])), 1),
            "times fewer rows": round(
                float(fixed / np.mean([answer.rows for answer in each])), 2
            ),
        }
        for name, each in answers.items()
    }  # fmt: skip


def shortfall(labels: RowLabels, question: Question) -> dict[str, Any]:
    """Relative loss of radius of early stopping that draws all rows, over certified images."""
    found = [
        (two_sided(question, *rows).radius, anytime(question, *rows).radius)
        for rows in _pairs(labels)
    ]
    losses = [1.0 - ours / plain for plain, ours in found if plain > 0.0]
    return {
        "images": len(losses),
        "mean": round(float(np.mean(losses)), 5) if losses else None,
        "largest": round(max(losses), 5) if losses else None,
        "largest, in sigma": round(max(p - o for p, o in found) / question.sigma, 5),
    }


def unanimous(labels: RowLabels) -> list[int]:
    """Indices of the images whose first AGREEING_ROWS estimation rows have one label."""
    first = labels.estimation[:, :AGREEING_ROWS]
    return np.flatnonzero((first == first[:, :1]).all(1)).tolist()


def over_http(
    data: LabelledImages, indices: Sequence[int], target: float, plan: Plan, runtime: str
) -> dict[str, Any] | None:
    """Seconds and rows of questions with a target, one after another; None without images.

    The service draws other rows than those of the labels.
    """
    if not indices:
        return None
    found = asyncio.run(_ask([_png(data, i) for i in indices], target, plan, runtime))
    seconds, rows = np.array(found).T
    quick = seconds[rows <= UNANIMOUS_ROWS]
    return {
        "mean rows": round(float(rows.mean()), 1),
        "seconds": _spread(seconds),
        f"of at most {UNANIMOUS_ROWS} rows": len(quick),
        f"seconds of at most {UNANIMOUS_ROWS} rows": _spread(quick) if len(quick) else None,
    }


async def _ask(
    images: Sequence[bytes], target: float, plan: Plan, runtime: str
) -> list[tuple[float, int]]:
    """Seconds and rows of each image, after an unmeasured question about the first."""
    question = {"sigma": plan.sigma, "alpha": ALPHA, "n": plan.rows}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), api_keys=(), api_keys_file=None)
        embedded = Embedded(settings, tried_runtime(runtime, read_bundle(DEFAULT_TASK)))
        async with (
            serving(embedded) as (_, address),
            httpx.AsyncClient(base_url=address, timeout=WAIT_SECONDS) as client,
        ):
            await _post(client, images[0], {**question, "n": WARM_UP_ROWS})
            for image in images:
                found.append(await _post(client, image, {**question, "target_radius": target}))
        leave_if_hung(embedded)
    return found


async def _post(
    client: httpx.AsyncClient, image: bytes, question: dict[str, float]
) -> tuple[float, int]:
    headers = {"Prefer": f"wait={WAIT_SECONDS}"}
    fields = {name: str(value) for name, value in question.items()}
    answer = await client.post("/predict", files={"image": image}, data=fields, headers=headers)
    answer.raise_for_status()
    return answer.elapsed.total_seconds(), answer.json()["rows_used"]


def beside_art(
    plan: Plan, data: LabelledImages, targets: Sequence[float], runtime: str
) -> dict[str, Any]:
    """ART and the service on the same images: certified, rows, seconds, memory of a process."""
    count = min(ART_IMAGES, len(data))
    child = ["-m", "service.cli.bench.art", SLICE, count, plan.sigma, plan.rows]
    printed, mib = measured([str(each) for each in child], {})
    _, radii, seconds = zip(*json.loads(printed.splitlines()[-1]), strict=True)
    question = ["--sigma", str(plan.sigma), "--n", str(plan.rows), "--target-radius"]
    return {
        "images": count,
        "art": {
            "certified at": {f"{t:g}": sum(radius >= t for radius in radii) for t in targets},
            "rows": SELECTION_ROWS + plan.rows,
            "seconds": _spread(np.array(seconds)),
            "peak memory, MiB": mib,
        },
        "vouchsafe": {
            f"{target:g}": {
                **(over_http(data, range(count), target, plan, runtime) or {}),
                "peak memory, MiB": peak_mib(_png(data, 0), [*question, str(target)], runtime),
            }
            for target in targets
        },
    }


def _pairs(labels: RowLabels) -> Iterator[tuple[Labels, Labels]]:
    """Selection and estimation labels of each image."""
    return zip(labels.selection, labels.estimation, strict=True)


def _right(answers: Sequence[Answer], data: LabelledImages, target: float) -> int:
    pairs = zip(answers, data.labels, strict=True)
    return sum(answer.reaches(target) and bool(answer.label == truth) for answer, truth in pairs)


def _spread(seconds: NDArray[np.float64]) -> dict[str, float]:
    names = {"least": 0, "median": 50, "most": 100}
    return {name: round(float(np.percentile(seconds, q)), 3) for name, q in names.items()}


def _png(data: LabelledImages, index: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(data.images[index]).save(stream, "PNG")
    return stream.getvalue()
