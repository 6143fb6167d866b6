"""Answers of a running server, for `vouchsafe predict --server`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from service.cli.console import errors
from service.client import AsyncClient, ProblemError, Unreachable
from service.errors import JobFailed, Problem
from service.predictions.schemas import PredictResponse

AT_ONCE = 8
"""Questions in the server at a time."""


async def answers(
    url: str, key: str | None, paths: Sequence[Path], fields: Mapping[str, Any], *, quiet: bool
) -> AsyncIterator[tuple[Path, PredictResponse | Problem]]:
    """Each path with the server's answer or its problem, in order.

    Raises ValueError for a malformed URL.
    """
    room = asyncio.Semaphore(AT_ONCE)
    async with AsyncClient(url, key=key) as client:

        async def answered(path: Path) -> PredictResponse | Problem:
            async with room:
                try:
                    found = await client.predict(path, **fields)
                except ProblemError as error:
                    return JobFailed({"detail": str(error), **error.document})
                except (Unreachable, OSError) as error:
                    return Problem(str(error))
                return PredictResponse.model_validate(found)

        tasks = [asyncio.create_task(answered(path)) for path in paths]
        try:
            with Progress(console=errors, disable=quiet, transient=True) as progress:
                bar = progress.add_task("asking", total=len(paths))
                for path, task in zip(paths, tasks, strict=True):
                    yield path, await task
                    progress.advance(bar)
        finally:
            for task in tasks:
                task.cancel()
