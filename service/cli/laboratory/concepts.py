"""The command `concepts`: what a task's CLIP head sees in an image, before and after an attack."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from models.bundle import BundleError
from models.files import written_whole
from service.cli.adapt import read_labels
from service.cli.console import errors, read_settings, tell
from service.cli.evaluation.bundles import local_bundles
from service.predictions.question import SMALLEST_SIGMA

RESULTS = "concepts.json"
MOST_NAMED = 10


def concepts(
    image: Annotated[Path, typer.Argument(help="A JPEG, PNG or WebP.")],
    words_in: Annotated[
        Path,
        typer.Option(
            "--concepts", help="A text file, one concept a line; after a tab, its prompt."
        ),
    ],
    task: Annotated[str, typer.Option(help="A task's id, or its name.")] = "default",
    label: Annotated[
        str | None,
        typer.Option(help="What the image shows.", show_default="the classifier's own answer"),
    ] = None,
    eps: Annotated[
        float, typer.Option(help="Largest l2 change of the attack, pixels in [0,1].")
    ] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 100,
    sigma: Annotated[float, typer.Option(help="Noise strength, pixels in [0,1].")] = 0.25,
    rows: Annotated[int, typer.Option(min=1, help="Noise rows of the defended shares.")] = 32,
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
    words = [each if isinstance(each, tuple) else (each, each) for each in read_labels(words_in)]
    try:
        if eps <= 0 or not math.isfinite(eps):
            raise ValueError(f"eps = {eps}: must be finite and greater than 0")
        (bundle,) = local_bundles(settings, [task])
        if not SMALLEST_SIGMA <= sigma <= bundle.largest_sigma:
            limits = f"from {SMALLEST_SIGMA} to {bundle.largest_sigma}"
            raise ValueError(f"sigma = {sigma}: must be {limits}")
        if label is not None and label not in bundle.labels:
            known = ", ".join(bundle.labels[:MOST_NAMED])
            raise ValueError(f"label = {label!r}: must be a label of task {task}, as {known}")
        from models.evaluation.attacks.grid import distance
        from models.evaluation.attacks.registry import Strength, Target, attacked
        from models.evaluation.concepts import WAYS, ConceptHead, draw, ranked
        from models.evaluation.tables import noise_key
        from models.runtime import Torch
        from service.cli.evaluation.images import LabeledFile
        from service.cli.evaluation.tasks import LocalTask

        head = ConceptHead(bundle, [word for word, _ in words], dict(words), settings.models_folder)
        clean = LabeledFile(0, str(image), "", image.read_bytes).pixels(bundle.resolution)
        networks = LocalTask(task, bundle, Torch(), settings.models_folder)
        index = networks.plain_label(clean) if label is None else bundle.labels.index(label)
        target = Target(networks.with_gradients, None, clean, index, 0)
        found = attacked("pgd", target, Strength(eps, steps, 1, 1, seed))
    except (ValueError, BundleError) as error:
        tell(error)
        raise typer.Exit(2) from error
    shown = {"original": clean, "attacked": found}
    readings = {
        name: head.read(pixels, sigma, rows, noise_key(seed, 0, f"concepts {name}"))
        for name, pixels in shown.items()
    }
    found_concepts = {
        name: {way: dict(ranked(head.concepts, getattr(reading, way), top)) for way in WAYS}
        for name, reading in readings.items()
    }
    document = {
        "image": str(image),
        "task": bundle.id,
        "label": bundle.labels[index],
        "attack": {"eps": eps, "steps": steps, "norm": distance(clean, found), "seed": seed},
        "sigma": sigma,
        "rows": rows,
        "answers": {
            name: bundle.labels[networks.plain_label(each)] for name, each in shown.items()
        },
        "concepts": found_concepts,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with written_whole(out / RESULTS) as partial:
            partial.write_text(json.dumps(document, indent=2) + "\n")
            partial.chmod(0o644)
        draw(shown, readings, head.concepts, top, out)
        errors.print(f"wrote {out}")
    Console().print(_table(found_concepts))


def _table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """The concepts of each picture, undefended and defended, with their shares in percent."""
    caption = "Shares of the concepts in percent. They are no probabilities, and nothing is proven."
    heads = [f"{name}, {way}" for name, by_way in found.items() for way in by_way]
    table = Table(*heads, caption=caption)
    columns = [list(shares.items()) for by_way in found.values() for shares in by_way.values()]
    for line in zip(*columns, strict=True):
        table.add_row(*(f"{concept} {100 * share:.1f}" for concept, share in line))
    return table
