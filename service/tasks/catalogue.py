"""The tasks that can be asked for: the built-in ones and the bundles published in a folder."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

from models.bundle import Bundle, BundleError, read_bundle
from service.health import passed
from service.tasks.task import is_task_id

logger = logging.getLogger("vouchsafe.tasks")

POLL_SECONDS = 1.0

Signature = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of each file of a bundle: what tells that it must be read anew."""


class Catalogue(Mapping[str, Bundle]):
    """Verified bundles by what callers send as `task`; `refresh` finds what came and went.

    `refused` says of each folder that is not served why. Bundles of a folder are named like it.
    """

    def __init__(self, built_in: Mapping[str, Bundle], folder: Path) -> None:
        self.refused: dict[str, str] = {}
        self._built_in = dict(built_in)
        self._folder = folder
        self._bundles = dict(built_in)
        self._signatures: dict[str, Signature] = {}
        self._gone: set[str] = set()
        self._alone = asyncio.Lock()

    def __getitem__(self, task: str) -> Bundle:
        return self._bundles[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundles)

    def __len__(self) -> int:
        return len(self._bundles)

    async def refresh(self) -> None:
        """Read what has changed in the folder."""
        async with self._alone:
            signatures = await asyncio.to_thread(_signatures, self._folder)
            changed = [task for task, found in signatures.items() if self._is_new(task, found)]
            bundles = {task: self._bundles[task] for task in signatures if task in self._bundles}
            refused = {task: self.refused[task] for task in signatures if task in self.refused}
            for task in changed:
                bundles.pop(task, None)
                refused.pop(task, None)
                try:
                    bundles[task] = await asyncio.to_thread(_read, self._folder / task)
                    logger.info("task %s is there to be asked", task)
                except (BundleError, OSError) as error:
                    refused[task] = str(error).replace(f"{self._folder}/", "")
                    logger.error("task %s is not served: %s", task, error)
            bundles = self._built_in | bundles
            self._gone |= {t for t, was in self._bundles.items() if bundles.get(t) is not was}
            self._bundles, self.refused, self._signatures = bundles, refused, signatures

    async def follow(self, stop: asyncio.Event, *, gone: Callable[[str], Awaitable[None]]) -> None:
        """Look once a second until `stop`, telling `gone` of each task not served as before."""
        while not stop.is_set():
            try:
                await self.refresh()
                while self._gone:
                    await gone(self._gone.pop())
            except Exception:
                logger.exception("the published tasks cannot be looked through; trying again")
            await passed(stop, POLL_SECONDS)

    def _is_new(self, task: str, signature: Signature) -> bool:
        return self._signatures.get(task) != signature


def _signatures(folder: Path) -> dict[str, Signature]:
    try:
        names = sorted(path.name for path in folder.iterdir() if is_task_id(path.name))
    except FileNotFoundError:
        return {}
    found = {name: _signature(folder / name) for name in names}
    return {name: signature for name, signature in found.items() if signature}


def _signature(folder: Path) -> Signature:
    """Empty for what is no folder or is being removed."""
    try:
        paths = sorted(folder.rglob("*"))
        states = [(path, path.lstat()) for path in paths if not path.is_dir()]
    except OSError:
        return ()
    return tuple(
        (path.relative_to(folder).as_posix(), state.st_mtime_ns, state.st_size)
        for path, state in states
    )


def _read(folder: Path) -> Bundle:
    bundle = read_bundle(folder)
    if bundle.id != folder.name:
        raise BundleError(f"{folder}: the manifest says the id {bundle.id!r}")
    return bundle
