"""The tasks that can be asked for: the built-in ones and the bundles published in a folder."""

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
"""A base network's folder, the hashes that a bundle states, and the files as they are."""
_UNSEEN: Signature = (("", 0, 0),)


@dataclass(frozen=True, slots=True)
class RefusedBundle:
    """Why a bundle is not served, whether making it anew would help, and what its files were."""

    reason: str
    replaceable: bool
    seen: Signature


@dataclass(frozen=True, slots=True)
class _Found:
    """One look: bundles as read, whatever became of their networks, and what is made of each."""

    read: dict[str, tuple[Signature, Bundle]] = field(default_factory=dict)
    served: dict[str, Bundle] = field(default_factory=dict)
    refused: dict[str, RefusedBundle] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


class Catalog(Mapping[str, Bundle]):
    """Verified bundles by what callers send as `task`; `refresh` finds what came and went.

    `refused` says of each folder that is not served why, and `unread` of each that could not be
    looked at and will be again. Bundles of a folder are named like it. Their base networks lie in
    the package or in `models_dir`.
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
        self._alone = asyncio.Lock()

    def __getitem__(self, task: str) -> Bundle:
        return self._bundles[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundles)

    def __len__(self) -> int:
        return len(self._bundles)

    async def refresh(self) -> None:
        """Read what has changed in the folder, or in the networks that its bundles build on."""
        async with self._alone:
            found = await asyncio.to_thread(self._look_through)
            bundles = self._built_in | found.served
            self._gone |= {t for t, was in self._bundles.items() if bundles.get(t) is not was}
            self._bundles, self._read = bundles, found.read
            self.refused, self.unread = found.refused, found.unread

    async def follow(self, stop: asyncio.Event, *, gone: Callable[[str], Awaitable[None]]) -> None:
        """Look once a second until `stop`, telling `gone` of each task not served as before."""
        while not stop.is_set():
            try:
                await self.refresh()
                await self._tell(gone)
            except Exception:
                logger.exception("the published tasks cannot be looked through; trying again")
            await sleep_or_stop(stop, POLL_SECONDS)

    async def _tell(self, gone: Callable[[str], Awaitable[None]]) -> None:
        """Tell of each task once; of one where that raises, the next time again."""
        while self._gone:
            task = self._gone.pop()
            try:
                await gone(task)
            except BaseException:
                self._gone.add(task)
                raise

    def _look_through(self) -> _Found:
        """What the folder holds now; only what has changed is read and hashed."""
        found, states = _Found(), dict[str, Signature]()
        for task, seen in self._look().items():
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
                        "task %s is there to be asked, as %s",
                        task,
                        bundle.digest[:16],
                        extra=naming(task_id=task),
                    )
                found.served[task] = bundle
            except Exception as error:
                self._leave_out(found, task, seen, error)
        return found

    def _leave_out(self, found: _Found, task: str, seen: Signature, error: Exception) -> None:
        """Not served, but for passing trouble with the networks of a task that is."""
        reason = f"{error}".replace(f"{self._folder}/", "").replace(f"{MODELS}/", "")
        _, read = found.read.get(task, (None, None))
        if read is not None and self._bundles.get(task) is read and _will_pass(error):
            found.served[task] = read
            return
        if _will_pass(error):
            found.unread[task] = reason
        else:
            found.refused[task] = RefusedBundle(reason, _is_replaceable(self._folder / task), seen)
        before = self.refused.get(task)
        if reason not in (self.unread.get(task), before and before.reason):
            logger.error("task %s is not served: %s", task, error, extra=naming(task_id=task))

    def _look(self) -> dict[str, Signature]:
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
        """The task's bundle, read anew where its files are not as they were."""
        before, known = self._read.get(task, (None, None))
        if known is not None and before == seen:
            return known
        folder = self._folder / task
        bundle = read_bundle(folder)
        if bundle.id != folder.name:
            raise BundleError(f"{folder}: the manifest says the id {bundle.id!r}")
        return bundle

    def _verify(self, base: Base, states: dict[str, Signature]) -> None:
        """As `Base.verified`, but files that have not changed since are not hashed again.

        `states` are the signatures of base networks' folders as this look has found them.
        """
        base_folder(base.folder, self._models_dir)  # Before anything elsewhere is looked at.
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
