"""The command `concepts`: what a task's CLIP head sees in an image, before and after an attack."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from models.bundle import Bundle, BundleError
from models.files import written_whole
from service.cli.adapt import read_labels
from service.cli.console import errors, read_settings, tell
from service.cli.evaluation.bundles import local_bundles
from service.cli.evaluation.command import AttackName
from service.predictions.question import SMALLEST_SIGMA

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from models.evaluation.concepts import Reading
    from models.smoothing import SmoothedModel

MOST_NAMED = 10


class Way(StrEnum):
    """The classifier alone, or behind noise and denoiser."""

    UNDEFENDED = "undefended"
    DEFENDED = "defended"


def concepts(
    image: Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP.")],
    words_in: Annotated[
        str,
        typer.Option(
            "--concepts",
            help="Concepts between commas, or a text file of one a line; after a tab, its prompt.",
        ),
    ],
    task: Annotated[str, typer.Option(help="A task's id, or its name.")] = "default",
    label: Annotated[
        str | None,
        typer.Option(help="What the image shows.", show_default="the classifier's own answer"),
    ] = None,
    attack: Annotated[AttackName, typer.Option(help="See docs/attacks.md.")] = AttackName.PGD,
    against: Annotated[Way, typer.Option(help="What the attack is made for.")] = Way.UNDEFENDED,
    eps: Annotated[
        float, typer.Option(help="Largest change of the attack, l2 unless it is one of l_inf.")
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 100,
    sigma: Annotated[float, typer.Option(help="Noise strength, pixels in [0,1].")] = 0.25,
    rows: Annotated[
        int, typer.Option(min=1, help="Noise rows of the defended concepts, and of the attack.")
    ] = 32,
    top: Annotated[int, typer.Option(min=1, help="Concepts to show.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Folder of concepts.json and the picture, PNG and SVG.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of attack and noise.")] = 0,
) -> None:
    """Show the concepts nearest to an image, before and after an attack on the classifier.

    Both are read undefended and behind noise and denoiser. Exits with 2 for an option, a file or a
    task that cannot be used.
    """
    settings = read_settings()
    try:
        words = _words(words_in)
        (bundle,) = local_bundles(settings, [task])
        _check(bundle, label, attack, eps, sigma)
        from models.evaluation.attacks.grid import distance
        from models.evaluation.attacks.registry import Strength, Target, attacked
        from models.evaluation.concepts import BATCH_ROWS, ConceptHead, ranked
        from models.evaluation.pictures.concepts import draw_concepts
        from models.evaluation.tables import noise_key
        from models.runtime import Torch
        from service.cli.evaluation.images import LabeledFile
        from service.cli.evaluation.tasks import LocalTask

        head = ConceptHead(bundle, list(words), words, settings.models_folder)
        original = LabeledFile(0, str(image), "", image.read_bytes).pixels(bundle.resolution)
        model = LocalTask(task, bundle, Torch(), settings.models_folder).with_gradients
        answer = _answer(model, original)
        index = answer if label is None else bundle.labels.index(label)
        target = Target(model, sigma if against is Way.DEFENDED else None, original, index, 0)
        strength = Strength(eps, steps, rows, BATCH_ROWS, seed)
        images = {"original": original, "attacked": attacked(attack, target, strength)}
    except (ValueError, BundleError) as error:
        tell(error)
        raise typer.Exit(2) from error
    readings: dict[str, dict[str, Reading]] = {
        Way.UNDEFENDED: {name: head.undefended(pixels) for name, pixels in images.items()},
        Way.DEFENDED: {
            name: head.defended(
                pixels, model.denoiser, sigma, rows, noise_key(seed, 0, f"concepts {name}")
            )
            for name, pixels in images.items()
        },
    }
    tops = {
        way: {name: ranked(reading.shares, top) for name, reading in by_image.items()}
        for way, by_image in readings.items()
    }
    document = {
        "image": str(image),
        "task": bundle.id,
        "label": bundle.labels[index],
        "attack": {
            "name": attack,
            "against": against,
            **{"eps": eps, "steps": steps, "seed": seed},
            "norm": distance(*images.values()),
        },
        "sigma": sigma,
        "rows": rows,
        "scale": head.scale,
        "answers": {name: bundle.labels[_answer(model, each)] for name, each in images.items()},
        "concepts": {
            way: {
                name: _described(readings[way][name], head.concepts, indices)
                for name, indices in by_image.items()
            }
            for way, by_image in tops.items()
        },
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(out / "concepts.json") as partial:
            partial.write_text(json.dumps(document, indent=2) + "\n")
            partial.chmod(0o644)
        shown = {way: [*dict.fromkeys(chain(*by_image.values()))] for way, by_image in tops.items()}
        draw_concepts(images, readings, head.concepts, shown, out / "concepts")
        errors.print(f"wrote {out}")
    Console().print(_table(document))


def _words(given: str) -> dict[str, str]:
    """Each concept with its word in the template: words between commas, or a file's lines.

    Raises ValueError for one that occurs twice, OSError for a file that cannot be read.
    """
    if "," in given and not os.path.exists(given):  # A long list is no path.
        found: Sequence[str | tuple[str, str]] = [
            word.strip() for word in given.split(",") if word.strip()
        ]
    else:
        found = read_labels(Path(given))
    pairs = [each if isinstance(each, tuple) else (each, each) for each in found]
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"concepts: {twice!r} occurs twice")
    return dict(pairs)


def _check(bundle: Bundle, label: str | None, attack: str, eps: float, sigma: float) -> None:
    """Raises ValueError, with field, value and limit, for an option that cannot be used."""
    from models.evaluation.attacks.registry import ATTACKS, PACKAGES

    if attack in PACKAGES:
        known = ", ".join(name for name in ATTACKS if name not in PACKAGES)
        raise ValueError(f"attack = {attack}: must be one of {known}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps = {eps}: must be finite and greater than 0")
    if not SMALLEST_SIGMA <= sigma <= bundle.largest_sigma:
        limits = f"from {SMALLEST_SIGMA} to {bundle.largest_sigma}"
        raise ValueError(f"sigma = {sigma}: must be {limits}")
    if label is not None and label not in bundle.labels:
        known = ", ".join(bundle.labels[:MOST_NAMED])
        raise ValueError(f"label = {label!r}: must be a label of task {bundle.id}, as {known}")


def _answer(model: SmoothedModel, pixels: NDArray[np.uint8]) -> int:
    """The classifier's label index of an image (3,R,R) alone, in float32."""
    import torch

    with torch.inference_mode():
        x = torch.tensor(pixels, device=model.device)[None] / 255
        return int(model.classifier(x)[0].argmax())


def _described(
    reading: Reading, concepts: Sequence[str], indices: Sequence[int]
) -> dict[str, dict[str, float]]:
    return {
        concepts[index]: {
            "share": float(reading.shares[index]),
            "cosine": float(reading.cosines[index]),
        }
        for index in indices
    }


def _table(document: Mapping[str, Any]) -> Table:
    """The concepts of each image, undefended and defended, with shares and cosines."""
    caption = (
        f"Shares in percent, the softmax of {document['scale']:.4g} times the cosines in brackets. "
        "Shares are no probabilities, and nothing is proven."
    )
    columns = {
        f"{way}, {name}": found.items()
        for way, by_image in document["concepts"].items()
        for name, found in by_image.items()
    }
    table = Table(*columns, caption=caption)
    for line in zip(*columns.values(), strict=True):
        table.add_row(
            *(f"{word} {100 * own['share']:.1f} ({own['cosine']:.2f})" for word, own in line)
        )
    return table
