"""The catalog of tasks: the built-in ones and the bundles published in a folder."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.bundle import MODELS, SCHEMA, Base, Bundle, BundleError, read_bundle
from models.files import base_folder
from service.background import sleep_or_stop
from service.operations.logs import naming
from service.tasks.task import MANIFEST, Signature, is_task_id, signature

logger = logging.getLogger("vouchsafe.tasks")

POLL_SECONDS = 1.0

BaseState = tuple[str, tuple[tuple[str, str], ...], Signature]
"""A base network's folder, the hashes in a bundle's manifest, and the files' signature."""
_UNSEEN: Signature = (("", 0, 0),)


@dataclass(frozen=True, slots=True)
class RefusedBundle:
    """A bundle that is not served: the reason, whether a new one would help, its signature."""

    reason: str
    replaceable: bool
    seen: Signature


@dataclass(frozen=True, slots=True)
class _Scan:
    """The result of one scan: the bundles read, and those served, refused or unreadable."""

    read: dict[str, tuple[Signature, Bundle]] = field(default_factory=dict)
    served: dict[str, Bundle] = field(default_factory=dict)
    refused: dict[str, RefusedBundle] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


class Catalog(Mapping[str, Bundle]):
    """Verified bundles by the `task` of requests; `refresh` reads changes in `folder`.

    - `refused`: the folders that are not served, with the reasons.
    - `unread`: the folders that could not be read and will be read again, with the reasons.

    A bundle's id is its folder's name. Base networks lie in the package or in `models_dir`.
    """

    def __init__(
        self, built_in: Mapping[str, Bundle], folder: Path, models_dir: Path | None = None
    ) -> None:
        self.refused: dict[str, RefusedBundle] = {}
        self.unread: dict[str, str] = {}
        self._built_in = dict(built_in)
        self._folder = folder
        self._models_dir = models_dir
        self._bundles = dict(built_in)
        self._read: dict[str, tuple[Signature, Bundle]] = {}
        self._bases: dict[BaseState, str] = {}
        self._gone: set[str] = set()
        self._lock = asyncio.Lock()

    def __getitem__(self, task: str) -> Bundle:
        return self._bundles[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundles)

    def __len__(self) -> int:
        return len(self._bundles)

    async def refresh(self) -> None:
        """Read changes in the folder, and in the base networks of its bundles."""
        async with self._lock:
            found = await asyncio.to_thread(self._scan)
            bundles = self._built_in | found.served
            self._gone |= {t for t, was in self._bundles.items() if bundles.get(t) is not was}
            self._bundles, self._read = bundles, found.read
            self.refused, self.unread = found.refused, found.unread

    async def follow(self, stop: asyncio.Event, *, gone: Callable[[str], Awaitable[None]]) -> None:
        """Refresh once a second until `stop`; calls `gone` with each removed or replaced task."""
        while not stop.is_set():
            try:
                await self.refresh()
                await self._report(gone)
            except Exception:
                logger.exception("the published tasks cannot be read; trying again")
            await sleep_or_stop(stop, POLL_SECONDS)

    async def _report(self, gone: Callable[[str], Awaitable[None]]) -> None:
        """Call `gone` once with each task; a task for which it raises comes up next time again."""
        while self._gone:
            task = self._gone.pop()
            try:
                await gone(task)
            except BaseException:
                self._gone.add(task)
                raise

    def _scan(self) -> _Scan:
        """The folder's bundles; only changed files are read and hashed."""
        found, states = _Scan(), dict[str, Signature]()
        for task, seen in self._signatures().items():
            refused = self.refused.get(task)
            if refused is not None and refused.seen == seen and task not in self._read:
                found.refused[task] = refused
                continue
            try:
                bundle = self._bundle(task, seen)
                found.read[task] = seen, bundle
                for base in (bundle.denoiser, bundle.classifier):
                    self._verify(base, states)
                if self._bundles.get(task) is not bundle:
                    logger.info(
                        "task %s is available, as %s",
                        task,
                        bundle.digest[:16],
                        extra=naming(task_id=task),
                    )
                found.served[task] = bundle
            except Exception as error:
                self._reject(found, task, seen, error)
        return found

    def _reject(self, found: _Scan, task: str, seen: Signature, error: Exception) -> None:
        """Note why the task is not served; a served task survives transient errors."""
        reason = f"{error}".replace(f"{self._folder}/", "").replace(f"{MODELS}/", "")
        _, read = found.read.get(task, (None, None))
        if read is not None and self._bundles.get(task) is read and _is_transient(error):
            found.served[task] = read
            return
        if _is_transient(error):
            found.unread[task] = reason
        else:
            found.refused[task] = RefusedBundle(reason, _is_replaceable(self._folder / task), seen)
        before = self.refused.get(task)
        if reason not in (self.unread.get(task), before and before.reason):
            logger.error("task %s is not served: %s", task, error, extra=naming(task_id=task))

    def _signatures(self) -> dict[str, Signature]:
        """The signature of every bundle in the folder."""
        try:
            names = sorted(path.name for path in self._folder.iterdir() if is_task_id(path.name))
        except FileNotFoundError:
            return {}
        found = {}
        for name in names:
            try:
                found[name] = signature(self._folder / name)
            except OSError:
                refused = self.refused.get(name)
                seen = refused.seen if refused else _UNSEEN
                found[name] = self._read[name][0] if name in self._read else seen
        return {name: seen for name, seen in found.items() if seen}

    def _bundle(self, task: str, seen: Signature) -> Bundle:
        """The task's bundle, read again if its files have changed."""
        before, known = self._read.get(task, (None, None))
        if known is not None and before == seen:
            return known
        folder = self._folder / task
        bundle = read_bundle(folder)
        if bundle.id != folder.name:
            raise BundleError(f"{folder}: the manifest has the id {bundle.id!r}")
        return bundle

    def _verify(self, base: Base, states: dict[str, Signature]) -> None:
        """Verify like `Base.verified`, without hashing unchanged files again.

        `states` caches the signatures of base networks' folders during one scan.
        """
        base_folder(base.folder, self._models_dir)  # First, so that no other folder is read.
        if base.folder not in states:
            states[base.folder] = signature(MODELS / base.folder) if base.folder else ()
        state = base.folder, tuple(sorted(base.files.items())), states[base.folder]
        if state not in self._bases:
            try:
                base.verified(self._models_dir)
                self._bases[state] = ""
            except BundleError as error:
                self._bases[state] = str(error)
        if self._bases[state]:
            raise BundleError(self._bases[state])


def _is_transient(error: Exception) -> bool:
    """Whether the machine failed, not the bundle: the next scan may read it."""
    cause = error if isinstance(error, OSError) else error.__cause__
    missing = FileNotFoundError, NotADirectoryError, IsADirectoryError
    return isinstance(cause, OSError) and not isinstance(cause, missing)


def _is_replaceable(folder: Path) -> bool:
    """Whether the bundle is damaged; a bundle of another release may be intact."""
    try:
        described = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return True
    except OSError:
        return False
    schema = described.get("schema") if isinstance(described, dict) else None
    return schema in (None, 1, SCHEMA)
