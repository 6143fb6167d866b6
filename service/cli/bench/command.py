"""The command `bench`: measures speed, and `bench certificates` the rows that certificates cost."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from models.certificates.limits import MOST_ROWS
from service.cli.console import example, read_settings, tell
from service.cli.predict import Sigma

bench = typer.Typer(help="Measure speed, or the cost of certificates.")


@bench.callback(invoke_without_command=True)
def speed(
    context: typer.Context,
    n: Annotated[
        int, typer.Option("--n", min=11, max=MOST_ROWS // 10, help="Noise rows of a question.")
    ] = 1000,
    requests: Annotated[
        int, typer.Option(min=16, help="Questions to the engine and over HTTP.")
    ] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds whose median is reported.")] = 1,
) -> None:
    """Compare the speed of a plain loop, the engine, and the service over HTTP.

    The networks run as in `serve` (VOUCHSAFE_RUNTIME).
    """
    if context.invoked_subcommand is not None:
        return
    from service.cli.bench.speed import Plan
    from service.cli.bench.speed import bench as run

    logging.basicConfig(level=logging.WARNING)
    figures = run(Plan(n, requests, rounds), read_settings().runtime)
    print(figures.pop("plain loop"))
    print(json.dumps(figures, indent=2))


@bench.command(epilog=example("bench certificates"))
def certificates(
    images: Annotated[
        int, typer.Option(min=1, max=500, help="Images of the shipped slice, from its first.")
    ] = 50,
    rows: Annotated[
        int, typer.Option(min=100, max=MOST_ROWS, help="Most estimation rows of an image.")
    ] = 10_000,
    sigma: Sigma = 0.25,
    art: Annotated[
        bool, typer.Option("--art/--no-art", help="Also run IBM ART on ten of them (extra bench).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep the rows' labels in this .npz, and go on from it.")
    ] = None,
) -> None:
    """Compare the noise rows that rules need to certify the same images at sigma and 2 sigma.

    Every row is labeled once. The networks run as in `serve` (VOUCHSAFE_RUNTIME).
    """
    from service.cli.bench.certificates import Plan, compare

    logging.basicConfig(level=logging.WARNING)
    try:
        figures = compare(Plan(images, rows, sigma, art), read_settings().runtime, out)
    except ValueError as error:
        tell(error)
        raise typer.Exit(2) from error
    print(json.dumps(figures, indent=2))
