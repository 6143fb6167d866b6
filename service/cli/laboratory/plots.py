"""The command `plots`: certified-accuracy curves and ablations from logs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from service.cli.console import errors, tell
from service.cli.laboratory.tables import Logs


def plots(
    logs: Logs,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("plots"),
) -> None:
    """Draw curves of certified accuracy by data set, and ablations of k, lambda, shots and n.

    An ablation is drawn where two of its points or more have a log; PNG and SVG. Exits with 2 for a
    log that cannot be used, and where there is nothing to draw.
    """
    from models.evaluation.paper.layout import ablations
    from models.evaluation.paper.sources import COHEN, read_logs
    from models.evaluation.pictures.curves import draw, draw_panels
    from models.evaluation.results import Run

    try:
        found = read_logs(logs)
    except ValueError as error:
        tell(error)
        raise typer.Exit(2) from error
    runs: dict[str, list[Run]] = defaultdict(list)
    for name, log in sorted(found.items()):
        dataset, _, own = name.partition("/")
        for rule, run in log.certified.items():
            title = own if rule == COHEN else f"{own}, {rule}"
            runs[dataset].append(Run(title, run.settings, run.records))
    pictures = [picture for picture in ablations(found) if picture.drawable]
    if not runs and not pictures:
        tell("no log has certified radii, and no ablation has two points: there is nothing to draw")
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    try:
        for dataset, certified in runs.items():
            files += draw(certified, out / f"curve-{dataset}")
        for picture in pictures:
            series = {panel.title: panel.series for panel in picture.panels}
            path = out / f"ablation-{picture.name}"
            files += draw_panels(picture.x, series, picture.label, path, picture.scale)
    except ImportError as error:
        tell(f"nothing is drawn ({error}): pip install '.[torch]' in the checkout")
        raise typer.Exit(2) from error
    for file in files:
        errors.print(f"wrote {file}")
