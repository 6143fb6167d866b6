"""The command `predict`: classifies images on this machine, or by a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from models.bundle import DEFAULT_TASK, read_bundle
from models.certificates.alpha import family_share
from service.cli.answers import shown, table_of
from service.cli.console import errors, read_settings, tell
from service.cli.files import pictures, places, save
from service.config import Settings
from service.errors import InvalidImage, Problem
from service.jobs import Mode
from service.predictions.question import Method, PredictRequest
from service.predictions.schemas import PredictResponse
from service.secrets import load_secret
from service.validation import invalid_fields

if TYPE_CHECKING:
    from service.predictions.service import Predictions
    from service.processes.embedded import Embedded

T = TypeVar("T")

Sigma = Annotated[float, typer.Option(help="Noise strength in [0,1] pixel units.")]
Alpha = Annotated[float, typer.Option(help="Chance at which a certificate may be wrong.")]
SelectionRows = Annotated[int, typer.Option("--n0", help="Noise rows that choose the label.")]


class DeviceError(RuntimeError):
    """The worker has ended, so the networks cannot be used."""


def predict(
    images: Annotated[
        list[str], typer.Argument(help="JPEG, PNG or WebP files, folders of them, or patterns.")
    ],
    task: Annotated[str, typer.Option(help="A task's id, or its name.")] = "default",
    mode: Annotated[
        Mode, typer.Option(help="With a radius, the label alone, or of the purified image.")
    ] = Mode.CERTIFY,
    sigma: Annotated[
        list[float] | None,
        typer.Option(
            help="Noise strength in [0,1] pixel units; repeated, descending, for a cascade.",
            show_default="0.25",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Chance at which a certificate may be wrong.", show_default="0.001"),
    ] = None,
    family_alpha: Annotated[
        float | None,
        typer.Option(help="Chance at which any of them may be wrong; each image has a share."),
    ] = None,
    target_radius: Annotated[
        float | None, typer.Option(help="The radius that suffices; the answer may come early.")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="two-sided, or anytime with a target radius.")
    ] = None,
    n0: Annotated[
        int | None,
        typer.Option("--n0", help="Noise rows that choose the label; 100, or 16 with a target."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", help="Most noise rows; 1000, 100 to predict, or 10000 with a target."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line an image: its answer or its problem.")
    ] = False,
    certificate: Annotated[
        Path | None,
        typer.Option(help="Write the certificate here; for several images, a folder of them."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="URL of a running server that answers in this machine's place."),
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File with the server's API key.")] = None,
) -> None:
    """Classify images on this machine, or by a server.

    Exits with 1 if an image has no answer, and with 2, before any work, for an invalid path or
    field. A server refuses an invalid field for each image.
    """
    settings = read_settings()
    fields: dict[str, object] = {"task": task, "mode": mode}
    several = tuple(sigma or ())
    if several:
        fields["sigma"] = several if len(several) > 1 else several[0]
    given = {"alpha": alpha, "target_radius": target_radius, "method": method, "n0": n0, "n": n}
    fields |= {name: value for name, value in given.items() if value is not None}
    try:
        paths = pictures(images)
        if family_alpha is not None:
            if alpha is not None:
                _fail("--alpha and --family-alpha exclude each other")
            fields["alpha"] = share = family_share(family_alpha, len(paths))
            errors.print(f"m = {len(paths)}: each image has alpha {share:.3g}")
        if server is None:
            asyncio.run(_check(settings, fields))
        key = None if key_file is None else key_file.read_text().strip()
        if certificate is not None and mode is not Mode.CERTIFY:
            _fail("--certificate needs --mode certify: no other mode certifies")
        files = [] if certificate is None else places(certificate, paths)
    except (OSError, ValueError, Problem) as error:
        _fail(error)

    if server is None:
        from service.processes.embedded import Embedded, leave_if_hung

        embedded = Embedded(settings)
        outcomes = _answers(embedded, paths, fields, quiet=as_json)
        answered = asyncio.run(_print_all(outcomes, files, as_json=as_json))
        leave_if_hung(embedded)
    else:
        from service.cli.remote import answers

        try:
            outcomes = answers(server, key, paths, fields, quiet=as_json)
            answered = asyncio.run(_print_all(outcomes, files, as_json=as_json))
        except ValueError as error:
            _fail(error)
    if answered < len(paths):
        raise typer.Exit(1)


def _fail(reason: object) -> NoReturn:
    tell(reason)
    raise typer.Exit(2)


async def _check(settings: Settings, fields: dict[str, object]) -> None:
    """Raise Problem for invalid fields, without loading networks.

    The check submits an empty image, which is rejected only after valid fields.
    """
    from service.engine.memory import MemoryEngine
    from service.engine.options import EngineOptions
    from service.engine.protocol import Worker
    from service.predictions.service import Predictions
    from service.signing import SigningKeys
    from service.tasks.catalog import Catalog
    from service.tasks.service import TaskService
    from service.tasks.store import Store

    question = _question(b"", fields)
    secret = load_secret(settings.data_dir, settings.noise_secret_file)
    catalog = Catalog(
        {"default": read_bundle(DEFAULT_TASK)}, settings.tasks_folder, settings.models_folder
    )
    await catalog.refresh()
    engine = MemoryEngine(EngineOptions(shard_rows=settings.shard_rows), poll_seconds=0)
    served = {task: bundle.served_digest({}) for task, bundle in catalog.items()}
    await engine.pull(Worker("check", served, [{}]), 0)
    tasks = TaskService(Store(settings, secret), catalog)
    keys = SigningKeys.from_settings(settings, secret)
    predictions = Predictions(settings, engine, catalog, secret, keys, tasks.expect)
    try:
        await predictions.submit(question, None, None)
    except InvalidImage:
        return
    finally:
        await predictions.close()


def _question(image: bytes, fields: dict[str, object]) -> PredictRequest:
    try:
        return PredictRequest.model_validate({"image": image, **fields})
    except ValidationError as error:
        raise invalid_fields(error.errors(), PredictRequest) from error


async def _print_all(
    outcomes: AsyncIterator[tuple[Path, PredictResponse | Problem]],
    files: Sequence[Path],
    *,
    as_json: bool,
) -> int:
    """Print answers and problems, as JSON once each is known; returns the number of answers.

    Certificates are written to `files`, one a path, if there are any.
    """
    answers: list[tuple[Path, PredictResponse]] = []
    left = iter(files)
    async for path, outcome in outcomes:
        file = next(left, None)
        if isinstance(outcome, PredictResponse):
            answers.append((path, outcome))
            _save(file, path, outcome)
            document = outcome.model_dump(mode="json")
        else:
            document = {"problem": outcome.document()}
        if as_json:
            print(json.dumps({"image": shown(path), **document}, ensure_ascii=False), flush=True)
        elif isinstance(outcome, Problem):
            errors.print(f"{shown(path)}: {outcome}", style="red")
    if answers and not as_json:
        Console().print(table_of(answers))
    return len(answers)


def _save(file: Path | None, path: Path, answer: PredictResponse) -> None:
    if file is not None and answer.certificate is None:
        errors.print(f"{shown(path)}: not certified, so {shown(file)} is not written")
    elif file is not None and answer.certificate is not None:
        save(file, answer.certificate)


async def _answers(
    embedded: Embedded, paths: Sequence[Path], fields: dict[str, object], *, quiet: bool
) -> AsyncIterator[tuple[Path, PredictResponse | Problem]]:
    """Each path with its answer or its problem, in order.

    Once the worker has ended, every further path gets that problem.
    """
    from service.predictions.service import Predictions
    from service.tasks.service import TaskService

    tasks = TaskService(embedded.store, embedded.tasks)
    predictions = Predictions(
        embedded.settings,
        embedded.engine,
        embedded.tasks,
        embedded.secret,
        embedded.keys,
        tasks.expect,
    )
    stop = asyncio.Event()
    working = asyncio.create_task(embedded.worker(on_failure=stop.set)(stop))
    looking = asyncio.create_task(predictions.keep_looking(stop))
    stopped: DeviceError | None = None
    try:
        with Progress(console=errors, disable=quiet, transient=True) as progress:
            for path in paths:
                try:
                    await _while_alive(working, embedded.ready())
                    prediction = _predict_one(embedded, predictions, path, fields, progress)
                    yield path, await _while_alive(working, prediction)
                except DeviceError as error:
                    if stopped is None:
                        tell(error)
                    stopped = error
                    yield path, Problem(str(error))
                except Problem as problem:
                    yield path, problem
    finally:
        stop.set()
        await asyncio.gather(working, looking, predictions.close(), return_exceptions=True)


async def _while_alive(working: asyncio.Task[None], call: Coroutine[Any, Any, T]) -> T:
    """The result of `call`; raises DeviceError if the worker ends first."""
    task = asyncio.create_task(call)
    await asyncio.wait({task, working}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        raise DeviceError(f"the networks stopped: {working.exception()}")
    return await task


async def _predict_one(
    embedded: Embedded,
    predictions: Predictions,
    path: Path,
    fields: dict[str, object],
    progress: Progress,
) -> PredictResponse:
    try:
        data = await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        raise InvalidImage(f"The file cannot be read: {error.strerror}") from error
    question = await predictions.resolved(_question(data, fields))
    await embedded.load(question.task)
    job_id = await predictions.submit(question, None, None)
    bar = progress.add_task(shown(Path(path.name)), total=question.rows)
    async for status in predictions.engine.watch(job_id):
        progress.update(bar, completed=status.rows_done)
    progress.remove_task(bar)
    return await predictions.to_response(await predictions.status(job_id, None))
