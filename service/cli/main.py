"""The `vouchsafe` command: serves, computes, classifies, makes tasks, verifies, measures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from models.bundle import BundleError
from service.cli import adapt, models, predict, verify, worker
from service.cli.bench import command as bench
from service.cli.console import example, read_settings, tell
from service.cli.evaluation import command as evaluation
from service.cli.laboratory import audit, concepts, plots, tables
from service.config import SecretError, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.operations.server import DrainingServer

logger = logging.getLogger("vouchsafe")

HELP = """Image classification whose every answer carries a provable l2 radius.

Exits with 0, with 1 where something fails, fails a check or has no answer, and with 2 for an
option, a file or a setting that cannot be used.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_ASK, _SERVE, _TASKS, _MEASURE = "Ask", "Serve", "Tasks", "Measure"
"""Groups of commands in the help."""


def _add(command: Callable[..., None], group: str, words: str) -> None:
    app.command(rich_help_panel=group, epilog=example(words))(command)


_add(worker.worker, _SERVE, "worker --port 9100")
_add(predict.predict, _ASK, "predict photo.jpg --certificate certificate.json")
_add(verify.verify, _ASK, "verify certificate.json --jwks jwks.json --image photo.jpg")
_add(verify.jwks, _ASK, "jwks")
_add(adapt.adapt, _TASKS, "adapt --labels labels.txt --name pets")
app.add_typer(models.models, name="models", rich_help_panel=_TASKS)
_add(evaluation.evaluate, _MEASURE, "evaluate --task default --images photographs --n 1000")
_add(tables.tables, _MEASURE, "tables runs/evaluation --table cifar10")
_add(plots.plots, _MEASURE, "plots runs/evaluation --out plots")
_add(audit.audit, _MEASURE, "audit log.tsv --n 100000 --sigma 0.25")
_add(concepts.concepts, _MEASURE, "concepts photo.png --concepts cat,dog,whiskers --out concepts")
app.add_typer(bench.bench, name="bench", rich_help_panel=_MEASURE)

_MAX_NAMED = 5
"""Most tasks in the message of a ready server."""


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except (SecretError, BundleError, OSError) as error:
        tell(_reason(error))
        raise SystemExit(2) from error


def _reason(error: Exception) -> object:
    """The error in one line; for a file, its name comes first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return error


def _print_version(wanted: bool) -> None:
    if wanted:
        from service.operations.metrics import VERSION

        print(f"vouchsafe {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of no command."""


@app.command(rich_help_panel=_SERVE, epilog=example("serve --port 9000"))
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
) -> None:
    """Serve predictions over HTTP, and make tasks.

    With VOUCHSAFE_REDIS_URL, `vouchsafe worker` processes compute, on this machine or others.
    """
    settings = read_settings(log=True)
    from service.operations.server import DrainingServer

    try:
        server = DrainingServer(host, port)
    except OSError as error:
        tell(error)
        raise typer.Exit(1) from error
    try:
        if settings.redis_url is None:
            _serve_embedded(settings, server)
        else:
            _serve_fleet(settings, server)
    finally:
        server.close()


def _serve_fleet(settings: Settings, server: DrainingServer) -> None:
    """Serve without torch; exits with 2 if the fleet has another data directory."""
    from service.processes.api import create_api

    reasons: list[str] = []

    def end(reason: str) -> None:
        reasons.append(reason)
        server.stop()

    served = create_api(settings, on_stranger=end)
    server.serve_app(served, lambda: _announce(settings, server, served))
    if reasons:
        tell(reasons[0])
        raise typer.Exit(2)


def _serve_embedded(settings: Settings, server: DrainingServer) -> None:
    """Serve with a worker in this process; loads torch."""
    from service.api.app import create_app
    from service.processes.embedded import Embedded, leave_if_hung
    from service.tasks.supervisor import Supervisor

    embedded = Embedded(settings)
    background = [embedded.worker(on_failure=server.stop), Supervisor(embedded.store).run]
    served = create_app(embedded.services(background))
    try:
        server.serve_app(served, lambda: _announce(settings, server, served))
    finally:
        leave_if_hung(embedded)


async def _announce(settings: Settings, server: DrainingServer, served: FastAPI) -> None:
    """Log one line once the process is ready; in a fleet, once it listens."""
    while settings.redis_url is None and not (await served.state.services.health.ready()).is_well:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    catalog = served.state.services.predictions.tasks
    with suppress(OSError):  # The catalog logs errors of its folder.
        await catalog.refresh()
    names = [f"{task} ({bundle.name})" if bundle.name else task for task, bundle in catalog.items()]
    more = len(names) - _MAX_NAMED
    logger.info(
        "ready at %s; tasks: %s; data directory: %s",
        server.url,
        ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else ""),
        settings.data_dir.resolve(),
        extra={
            "address": server.url,
            "tasks": list(catalog),
            "data_dir": str(settings.data_dir.resolve()),
        },
    )
