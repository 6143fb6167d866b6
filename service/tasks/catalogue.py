"""The tasks that can be asked for: the built-in ones and the bundles published in a folder."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.bundle import MODELS, SCHEMA, Base, Bundle, BundleError, read_bundle
from service.health import passed
from service.tasks.task import MANIFEST, is_task_id

logger = logging.getLogger("vouchsafe.tasks")

POLL_SECONDS = 1.0

Signature = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of each file of a bundle: what tells that it must be read anew."""
BaseState = tuple[str, tuple[tuple[str, str], ...], Signature]
"""A base network's folder, the hashes that a bundle states, and the files as they are."""
_UNSEEN: Signature = (("", 0, 0),)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a bundle is not served, and whether making it anew would help."""

    reason: str
    replaceable: bool


class Catalogue(Mapping[str, Bundle]):
    """Verified bundles by what callers send as `task`; `refresh` finds what came and went.

    `refused` says of each folder that is not served why, and `unread` of each that could not be
    looked at and will be again. Bundles of a folder are named like it.
    """

    def __init__(self, built_in: Mapping[str, Bundle], folder: Path) -> None:
        self.refused: dict[str, Refusal] = {}
        self.unread: dict[str, str] = {}
        self._built_in = dict(built_in)
        self._folder = folder
        self._bundles = dict(built_in)
        self._signatures: dict[str, Signature] = {}
        self._bases: dict[BaseState, str] = {}
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
            signatures = await asyncio.to_thread(self._look)
            changed = [task for task, found in signatures.items() if self._is_new(task, found)]
            bundles = {task: self._bundles[task] for task in signatures if task in self._bundles}
            refused = {task: self.refused[task] for task in signatures if task in self.refused}
            unread: dict[str, str] = {}
            for task in changed:
                bundles.pop(task, None)
                refused.pop(task, None)
                try:
                    bundle = await asyncio.to_thread(self._read, self._folder / task)
                    logger.info("task %s is there to be asked, as %s", task, bundle.digest[:16])
                    bundles[task] = bundle
                except Exception as error:
                    reason = f"{error}".replace(f"{self._folder}/", "")
                    if _will_pass(error):
                        unread[task] = reason
                        del signatures[task]
                    else:
                        refused[task] = Refusal(reason, _is_replaceable(self._folder / task))
                    if self.unread.get(task) != reason:
                        logger.error("task %s is not served: %s", task, error)
            bundles = self._built_in | bundles
            self._gone |= {t for t, was in self._bundles.items() if bundles.get(t) is not was}
            self._bundles, self._signatures = bundles, signatures
            self.refused, self.unread = refused, unread

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

    def _look(self) -> dict[str, Signature]:
        """The signature of every bundle in the folder."""
        try:
            names = sorted(path.name for path in self._folder.iterdir() if is_task_id(path.name))
        except FileNotFoundError:
            return {}
        found = {}
        for name in names:
            try:
                found[name] = _signature(self._folder / name)
            except OSError:
                found[name] = self._signatures.get(name, _UNSEEN)
        return {name: signature for name, signature in found.items() if signature}

    def _read(self, folder: Path) -> Bundle:
        bundle = read_bundle(folder)
        if bundle.id != folder.name:
            raise BundleError(f"{folder}: the manifest says the id {bundle.id!r}")
        for base in (bundle.denoiser, bundle.classifier):
            self._verify(base)
        return bundle

    def _verify(self, base: Base) -> None:
        """As `Base.verified`, but files that have not changed since are not hashed again."""
        files = tuple(sorted(base.files.items()))
        state = base.folder, files, _signature(MODELS / base.folder) if base.folder else ()
        if state not in self._bases:
            try:
                base.verified()
                self._bases[state] = ""
            except BundleError as error:
                self._bases[state] = str(error)
        if self._bases[state]:
            raise BundleError(self._bases[state])


def _signature(folder: Path) -> Signature:
    """Empty for what is no folder or is being removed; raises OSError for other trouble."""
    try:
        paths = sorted(folder.rglob("*"))
        states = [(path, path.lstat()) for path in paths if not path.is_dir()]
    except FileNotFoundError:
        return ()
    return tuple(
        (path.relative_to(folder).as_posix(), state.st_mtime_ns, state.st_size)
        for path, state in states
    )


def _will_pass(error: Exception) -> bool:
    """Whether the machine failed, not the bundle: it may be read the next time."""
    cause = error if isinstance(error, OSError) else error.__cause__
    missing = FileNotFoundError, NotADirectoryError, IsADirectoryError
    return isinstance(cause, OSError) and not isinstance(cause, missing)


def _is_replaceable(folder: Path) -> bool:
    """Whether the bundle is damaged; one that another release wrote may be whole."""
    try:
        described = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return True
    except OSError:
        return False
    schema = described.get("schema") if isinstance(described, dict) else None
    return schema in (None, 1, SCHEMA)
