"""The `vouchsafe` command: `serve`, `worker`, `predict`, `evaluate`, `bench`, `adapt`, `models`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from models.bundle import BundleError
from service import cli_models, cli_tasks, cli_worker, logs
from service.cli_tasks import errors, tell
from service.config import SecretError, Settings
from service.errors import Problem
from service.jobs import Mode
from service.schemas import MOST_ROWS, PredictRequest, PredictResponse, invalid_fields

if TYPE_CHECKING:
    from service.embedded import Embedded
    from service.predictions import Predictions
    from service.server import DrainingServer

app = typer.Typer(
    help="Image classification whose every answer carries a provable l2 radius.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(cli_tasks.adapt)
app.command()(cli_worker.worker)
app.add_typer(cli_models.models, name="models")
T = TypeVar("T")


class DeviceError(RuntimeError):
    """The networks cannot be used any more."""


Sigma = Annotated[float, typer.Option(help="Noise strength in [0,1] pixel units.")]
Alpha = Annotated[float, typer.Option(help="Chance at which a certificate may be wrong.")]
SelectionRows = Annotated[int, typer.Option("--n0", help="Noise rows that choose the label.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (SecretError, ValidationError, BundleError, OSError) as error:
        tell(error)
        raise SystemExit(2) from error


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Serve predictions over HTTP, and make the tasks that are asked for.

    With VOUCHSAFE_REDIS_URL the work is done by `vouchsafe worker`, on this machine or others.
    """
    from service.server import DrainingServer

    settings, server = Settings(), DrainingServer(host, port)
    logs.set_up(settings)
    if settings.redis_url is None:
        _serve_embedded(settings, server)
        return
    _serve_fleet(settings, server)


def _serve_fleet(settings: Settings, server: DrainingServer) -> None:
    """No torch here; exits with 2 where the fleet has another data directory."""
    from service.frontend import frontend

    reasons: list[str] = []

    def end(reason: str) -> None:
        reasons.append(reason)
        server.stop()

    server.serve_app(frontend(settings, on_stranger=end))
    if reasons:
        tell(reasons[0])
        raise typer.Exit(2)


def _serve_embedded(settings: Settings, server: DrainingServer) -> None:
    """Everything in this process: torch is loaded only now."""
    from service.api import create_app
    from service.embedded import Embedded, leave_if_hung
    from service.tasks.supervisor import Supervisor

    embedded = Embedded(settings)
    served = create_app(
        settings,
        embedded.engine,
        embedded.tasks,
        embedded.secret,
        companions=[
            embedded.worker(on_failure=server.stop),
            Supervisor(embedded.store).run,
        ],
    )
    try:
        server.serve_app(served)
    finally:
        leave_if_hung(embedded)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="JPEG, PNG or WebP files.")],
    task: Annotated[str, typer.Option(help="A task's id, or its name.")] = "default",
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
    fields = {"task": task, "mode": mode, "sigma": sigma, "alpha": alpha, "n0": n0}
    if n is not None:
        fields["n"] = n
    from service.embedded import Embedded, leave_if_hung

    embedded = Embedded(Settings())
    answers = asyncio.run(_predict_all(embedded, images, fields, quiet=as_json))
    if as_json:
        for _, answer in answers:
            print(answer.model_dump_json())
    elif answers:
        Console().print(_table(answers))
    leave_if_hung(embedded)
    if len(answers) < len(images):
        raise typer.Exit(1)


async def _predict_all(
    embedded: Embedded, images: list[Path], fields: dict[str, object], *, quiet: bool
) -> list[tuple[Path, PredictResponse]]:
    from service.predictions import Predictions
    from service.tasks.desk import TaskDesk

    tasks = TaskDesk(embedded.store, embedded.tasks)
    desk = Predictions(
        embedded.settings, embedded.engine, embedded.tasks, embedded.secret, tasks.expect
    )
    answers: list[tuple[Path, PredictResponse]] = []
    stop = asyncio.Event()
    working = asyncio.create_task(embedded.worker(on_failure=stop.set)(stop))
    try:
        await _while_alive(working, embedded.ready())
        with Progress(console=errors, disable=quiet, transient=True) as progress:
            for path in images:
                try:
                    asking = _predict_one(desk, path, fields, progress)
                    answers.append((path, await _while_alive(working, asking)))
                except (Problem, OSError) as problem:
                    errors.print(f"{path}: {problem}", style="red")
    except DeviceError as error:
        errors.print(f"vouchsafe: {error}", style="red")
    finally:
        stop.set()
        await asyncio.gather(working, desk.close(), return_exceptions=True)
    return answers


async def _while_alive(working: asyncio.Task[None], wanted: Coroutine[Any, Any, T]) -> T:
    """What `wanted` returns; raises DeviceError where the worker ends first."""
    task = asyncio.create_task(wanted)
    await asyncio.wait({task, working}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        raise DeviceError(f"the networks stopped: {working.exception()}")
    return await task


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


def _table(answers: list[tuple[Path, PredictResponse]]) -> Table:
    table = Table("image", "label", "radius", "p lower", "votes", caption=(
        "Certified means stable, not correct: no change of l2 norm below the radius, "
        "pixels in [0,1], changes the label. The radius is of the image as resized and cropped."
    ))  # fmt: skip
    for path, told in answers:
        votes = ", ".join(f"{vote.label} {vote.count}" for vote in told.counts[:3])
        table.add_row(
            escape(str(path)),
            escape(told.label) if told.label else "(abstained)",
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
    """Measure the default task: clean, one noisy row, certified accuracy, ACR.

    The networks run as `serve` would run them (VOUCHSAFE_RUNTIME).
    """
    from models.bundle import DEFAULT_TASK, read_bundle
    from models.evaluation import datasets, report
    from models.runtime import RUNTIMES

    data = datasets.cifar10(cifar10, "held-back") if cifar10 else datasets.evaluation_slice(images)
    figures = report.evaluate(
        read_bundle(DEFAULT_TASK),
        data[:count],
        report.Protocol(sigma, n0, n, alpha, seed),
        k=k,
        generated=generated,
        log=log,
        runtime=RUNTIMES[Settings().runtime](),
    )
    print(json.dumps(figures, indent=2))


@app.command()
def bench(
    n: Annotated[
        int, typer.Option("--n", min=10, max=MOST_ROWS // 10, help="Noise rows of a question.")
    ] = 1000,
    requests: Annotated[
        int, typer.Option(min=16, help="Questions asked of the engine and over HTTP.")
    ] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times over which to take medians.")] = 1,
) -> None:
    """Compare the speed of a plain loop, the engine, and the service over HTTP.

    The networks run as `serve` would run them (VOUCHSAFE_RUNTIME).
    """
    from service.bench import Plan
    from service.bench import bench as run

    logging.basicConfig(level=logging.WARNING)
    figures = run(Plan(n, requests, rounds), Settings().runtime)
    print(figures.pop("plain loop"))
    print(json.dumps(figures, indent=2))
