"""The command `worker`: computes for a fleet."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Annotated

import typer

from service.cli.console import read_settings, tell


def worker(
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of /livez /readyz /startupz /metrics, if any."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address of that port.")] = "127.0.0.1",
) -> None:
    """Compute jobs of a fleet's API processes, from VOUCHSAFE_REDIS_URL, until a signal."""
    for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, lambda *_: os._exit(0))  # No work is open before `run`.
    settings = read_settings(log=True)

    from service.engine.redis.requirements import RedisUnsuitable
    from service.processes.runtime import leave
    from service.processes.worker import WorkerProcess
    from service.worker.compute import DeviceFailed
    from service.worker.model import ModelUnavailable

    try:
        process = WorkerProcess(settings)
    except RedisUnsuitable as error:
        raise typer.Exit(_reported(error, 2)) from error
    status = 0
    try:
        asyncio.Runner().run(process.run(host, port))
    except (RedisUnsuitable, OSError) as error:
        status = _reported(error, 2)
    except (DeviceFailed, ModelUnavailable) as error:
        status = _reported(error, 1)
    except Exception:
        logging.getLogger("vouchsafe").exception("the worker failed")
        status = 1
    leave(status)


def _reported(error: Exception, status: int) -> int:
    """The exit `status`, once the error is printed in one line."""
    tell(error)
    return status
