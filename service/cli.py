"""The `vouchsafe` command: `serve`, `predict`, `evaluate`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from service.config import SecretError, Settings
from service.errors import Problem
from service.jobs import Mode
from service.schemas import PredictRequest, PredictResponse, invalid_fields

if TYPE_CHECKING:
    from service.embedded import Embedded
    from service.predictions import Predictions

app = typer.Typer(
    help="Image classification whose every answer carries a provable l2 radius.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
errors = Console(stderr=True)

Sigma = Annotated[float, typer.Option(help="Noise strength in [0,1] pixel units.")]
Alpha = Annotated[float, typer.Option(help="Chance at which a certificate may be wrong.")]
SelectionRows = Annotated[int, typer.Option("--n0", help="Noise rows that choose the label.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (SecretError, ValidationError) as error:
        errors.print(f"vouchsafe: {error}", style="red", highlight=False)
        raise SystemExit(2) from error


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve predictions over HTTP, with the embedded engine and the nano set."""
    import uvicorn

    from service.api import create_app
    from service.embedded import Embedded

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    embedded = Embedded(Settings())
    config = uvicorn.Config(
        app="", host=host, port=port, access_log=False, timeout_graceful_shutdown=30
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    config.app = create_app(
        embedded.settings,
        embedded.engine,
        embedded.tasks,
        embedded.secret,
        companions=[embedded.worker(on_failure=stop)],
    )
    # Uvicorn drains on SIGTERM and then raises it again; the process has ended well by then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server.run()
    if embedded.failed or not server.started:
        os._exit(1)  # A hung device's thread would keep the interpreter from ending.


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files.")],
    mode: Annotated[Mode, typer.Option(help="With a radius, or the label alone.")] = Mode.CERTIFY,
    sigma: Sigma = 0.25,
    alpha: Alpha = 0.001,
    n0: SelectionRows = 100,
    n: Annotated[
        int | None, typer.Option("--n", help="Noise rows; 1000, or 100 to predict.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON answer a line.")] = False,
) -> None:
    """Classify images on this machine; exits with 1 where one of them has no answer."""
    fields = {"mode": mode, "sigma": sigma, "alpha": alpha, "n0": n0}
    if n is not None:
        fields["n"] = n
    answers = asyncio.run(_predict_all(images, fields, quiet=as_json))
    if as_json:
        for answer in answers.values():
            print(answer.model_dump_json())
    elif answers:
        Console().print(_table(answers))
    if len(answers) < len(images):
        raise typer.Exit(1)


async def _predict_all(
    images: list[Path], fields: dict[str, object], *, quiet: bool
) -> dict[Path, PredictResponse]:
    from service.embedded import Embedded
    from service.predictions import Predictions

    embedded = Embedded(Settings())
    desk = Predictions(embedded.settings, embedded.engine, embedded.tasks, embedded.secret)
    answers: dict[Path, PredictResponse] = {}
    stop, failed = asyncio.Event(), asyncio.Event()
    working = asyncio.create_task(embedded.worker(on_failure=failed.set)(stop))
    try:
        await _until_served(embedded, working)
        with Progress(console=errors, disable=quiet, transient=True) as progress:
            for path in images:
                try:
                    answers[path] = await _predict_one(desk, path, fields, progress)
                except (Problem, OSError) as problem:
                    errors.print(f"{path}: {problem}", style="red", highlight=False)
    finally:
        stop.set()
        await asyncio.gather(working, desk.close(), return_exceptions=True)
    return answers


async def _until_served(embedded: Embedded, working: asyncio.Task[None]) -> None:
    while "default" not in (await embedded.engine.capacity()).bundles:
        if working.done():
            working.result()
        await asyncio.sleep(0.05)


async def _predict_one(
    desk: Predictions, path: Path, fields: dict[str, object], progress: Progress
) -> PredictResponse:
    try:
        data = await asyncio.to_thread(path.read_bytes)
        asked = PredictRequest.model_validate({"image": data, **fields})
    except ValidationError as error:
        raise invalid_fields(error.errors()) from error
    job_id = await desk.submit(asked, None, None)
    bar = progress.add_task(path.name, total=asked.rows)
    async for status in desk.engine.watch(job_id):
        progress.update(bar, completed=status.rows_done)
    progress.remove_task(bar)
    return desk.answer(await desk.status(job_id, None))


def _table(answers: dict[Path, PredictResponse]) -> Table:
    table = Table("image", "label", "radius", "p lower", "votes", caption=(
        "Certified means stable, not correct: no change of l2 norm up to the radius, pixels "
        "in [0,1], changes the label. The radius is of the image as resized and cropped."
    ))  # fmt: skip
    for path, told in answers.items():
        votes = ", ".join(f"{vote.label} {vote.count}" for vote in told.counts[:3])
        table.add_row(
            str(path),
            told.label or "(abstained)",
            "" if told.radius is None else f"{_floor(told.radius):.3f}",
            "" if told.p_lower is None else f"{_floor(told.p_lower):.3f}",
            f"{votes} of {told.n}",
        )
    return table


def _floor(value: float) -> float:
    """Rounded down to three places, for a bound must not be shown larger than it is."""
    return int(value * 1000) / 1000


@app.command()
def evaluate(
    images: Annotated[
        Path, typer.Option(help="A sheet of images, one a row, its labels beside it as JSON.")
    ] = Path("tests/data/cifar10-slice.png"),
    cifar10: Annotated[
        Path | None, typer.Option(help="Take the held-back training images of this folder.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    sigma: Sigma = 0.25,
    alpha: Alpha = 0.001,
    n0: SelectionRows = 100,
    n: Annotated[int, typer.Option("--n", help="Noise rows that bound its probability.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the noise keys.")] = 0,
    k: Annotated[float | None, typer.Option(help="Another timestep correction factor.")] = None,
    generated: Annotated[int, typer.Option(help="Also recognise so many made images.")] = 0,
    log: Annotated[Path | None, typer.Option(help="Write a TSV line an image.")] = None,
) -> None:
    """Measure the default task: clean, one noisy row, certified accuracy, ACR."""
    from models.bundle import DEFAULT_TASK, read_bundle
    from models.evaluation import datasets, report

    data = datasets.cifar10(cifar10, "held-back") if cifar10 else datasets.evaluation_slice(images)
    figures = report.evaluate(
        read_bundle(DEFAULT_TASK),
        data[:count],
        report.Protocol(sigma, n0, n, alpha, seed),
        k=k,
        generated=generated,
        log=log,
    )
    print(json.dumps(figures, indent=2))
