"""Figures of one task, as `vouchsafe evaluate` prints them."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models.adaptation.synthesize import Cascade, Sampling, encode
from models.bundle import Bundle
from models.evaluation.datasets import LabelledImages
from models.evaluation.tables import accuracy, certify_images, recognised, summarise
from models.runtime import Runtime
from models.smoothing import best_device, load
from models.zoo.registry import DENOISER_SETS


@dataclass(frozen=True, slots=True)
class Protocol:
    """The settings of a run, the same for every image; noise keys follow from `seed`."""

    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int


def evaluate(
    bundle: Bundle,
    data: LabelledImages,
    protocol: Protocol,
    *,
    k: float | None = None,
    generated: int = 0,
    log: Path | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Figures of a task on labeled images, as fractions, with all that they depend on.

    `k` replaces the bundle's own. The nano cascade generates `generated` images, spread over the
    labels, for the undefended head. Raises ValueError where the labels of `data` and bundle differ.
    """
    if data.names != bundle.labels:
        raise ValueError(f"the images' labels are {data.names}, the task's {bundle.labels}")
    threads = torch.get_num_threads()
    model = load(bundle if k is None else replace(bundle, k=k), runtime=runtime)
    run = certify_images(model, data, **asdict(protocol), log=log)
    watched = track(
        run, "certifying", len(data), console=Console(stderr=True), disable=not sys.stderr.isatty()
    )
    summary = summarise(list(watched))
    figures = {
        "images": summary.images,
        **asdict(protocol),
        "k": bundle.k if k is None else k,
        "numerics": model.numerics.described(),
        "bundle": model.digest,
        "undefended head, clean": accuracy(
            model.classifier, data, best_device(), model.numerics.batch_rows
        ),
        "one noisy row": round(summary.row_accuracy, 4),
        "certified at radius": summary.certified,
        "average certified radius": round(summary.average_certified_radius, 4),
        "certified at radius, two-sided": summary.certified_two_sided,
        "average certified radius, two-sided": round(summary.average_certified_radius_two_sided, 4),
    }
    if generated:
        torch.set_num_threads(threads)  # A model with cpu_threads leaves torch with one thread.
        each = generated // len(bundle.labels)
        stages = DENOISER_SETS["nano"].folders
        prompts = [*(bundle.template.format(word) for word in bundle.words), ""]
        states = encode(stages[0], prompts, best_device(), torch.float32)
        cascade = Cascade(*stages, best_device())
        share = recognised(
            model.classifier,
            partial(_made, cascade, states, each),
            best_device(),
            each,
            model.numerics.batch_rows,
        )
        figures["generated"] = each * len(bundle.labels)
        figures["generated, recognised by the head"] = share
    return figures


def _made(cascade: Cascade, states: Tensor, each: int, label: int) -> NDArray[np.uint8]:
    seeds = [1000 * label + shot for shot in range(each)]
    return cascade(states[[label] * each], states[-1], seeds, Sampling())
