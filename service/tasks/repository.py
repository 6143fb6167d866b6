"""Tasks as folders on disk: published bundles, and the adaptation jobs that make them.

Several processes may make, run and remove tasks in the same folders. Each folder appears or
vanishes by one rename, so a process may be killed at any point.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from models.adaptation.plan import LOCK, PLAN, REFERENCES
from models.bundle import WRITERS
from models.files import flush
from service.config import Settings
from service.errors import NotFound
from service.operations.logs import naming
from service.tasks.task import Signature, Task, is_task_id, job_status, signature

logger = logging.getLogger("vouchsafe.tasks")

REFERENCES_SHOWN = 20
CHILD_SECONDS = 10.0
"""Seconds that a removal waits for the job's process to exit."""
PARTIAL = ".partial-"
"""Prefix of the names of half-made folders."""
SPARED_SECONDS = 3_600.0
"""Age below which a fleet spares half-made folders, since machines may not share file locks."""
_LOCK = ".lock"
_REFERENCE = re.compile(r"(\d{1,4})-(\d{1,3})\.png")
_WITHDRAWN = ".withdrawn-"
_ENTRIES_READ = 1_000


class TaskRepository:
    """The tasks under a data directory; its methods block on the disk.

    `tasks` is the folder of published bundles, `jobs` of adaptation jobs, `models` of fetched
    networks.
    """

    def __init__(self, settings: Settings) -> None:
        root = settings.data_dir.resolve()
        self.tasks, self.jobs = root / "tasks", root / "jobs"
        self.models = settings.models_folder
        self._spared_seconds = 0.0 if settings.redis_url is None else SPARED_SECONDS

    @property
    def exists(self) -> bool:
        """Whether tasks were ever made here; an unmounted volume has no lock file."""
        return (self.jobs / _LOCK).is_file()

    def find(self, task_id: str) -> Task | None:
        """The task's current state, or None."""
        if not is_task_id(task_id):
            return None
        job, bundle = self.jobs / task_id, self.tasks / task_id
        try:
            return Task.of_job(job, bundle) if (job / PLAN).is_file() else Task.of_bundle(bundle)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.error(
                "task %s cannot be read: %s", task_id, error, extra=naming(task_id=task_id)
            )
            return None

    def get(self, task_id: str) -> Task:
        """The task's current state; raises NotFound."""
        if (task := self.find(task_id)) is None:
            raise NotFound("There is no such task, or no longer", task=task_id[:64])
        return task

    def all(self) -> list[Task]:
        """Every task, the oldest first."""
        ids = {path.name for folder in (self.tasks, self.jobs) for path in _folders(folder)}
        found = [self.find(task_id) for task_id in ids]
        return sorted((task for task in found if task is not None), key=_age)

    def unfinished(self) -> list[Task]:
        """The tasks whose jobs have not ended, the oldest first."""
        found = [self.find(job.name) for job in self._open()]
        unfinished = [task for task in found if task is not None and not task.status.ended]
        return sorted(unfinished, key=_age)

    def open_jobs(self) -> int:
        """Number of adaptation jobs that are queued or running; unreadable ones are skipped."""
        return len(self._open())

    def references(self, task: Task) -> list[str]:
        """File names of at most 20 pictures of the task, one of each label first."""
        try:
            with os.scandir(self.jobs / task.id / REFERENCES) as entries:
                names = [
                    entry.name for entry, _ in zip(entries, range(_ENTRIES_READ), strict=False)
                ]
        except OSError:
            return []
        found = [match for name in names if (match := _REFERENCE.fullmatch(name))]
        found.sort(key=lambda match: (int(match[2]), int(match[1])))
        return [match[0] for match in found[:REFERENCES_SHOWN]]

    def reference(self, task_id: str, name: str) -> bytes:
        """One picture's PNG file; raises NotFound."""
        if is_task_id(task_id) and _REFERENCE.fullmatch(name):
            path = self.jobs / task_id / REFERENCES / name
            if path.is_file() and not path.is_symlink():
                return path.read_bytes()
        raise NotFound("There is no such picture, or no longer")

    def usage(self) -> dict[str, int]:
        """Bytes of each task with its job, leftovers of killed processes included."""
        used: dict[str, int] = {}
        for folder in (self.tasks, self.jobs):
            for path in folder.iterdir() if folder.is_dir() else ():
                used[path.name] = used.get(path.name, 0) + _bytes_in(path)
        return used

    def delete(self, task_id: str) -> None:
        """Remove a task, published or not, and its job; the job's process then exits.

        Each folder is renamed before it is removed. Raises NotFound.
        """
        if not is_task_id(task_id):
            raise NotFound("There is no such task, or no longer", task=task_id[:64])
        with self._locked():
            trash = [self._moved_away(self.tasks / task_id)]
            trash.append(job := self._moved_away(self.jobs / task_id))
            if job is not None:
                _wait_until_free(job, CHILD_SECONDS)
            trash.append(self._moved_away(self.tasks / task_id))  # Published while it was deleted.
            leftovers = [
                path
                for prefix in (PARTIAL, _WITHDRAWN)
                for path in self.tasks.glob(f"{prefix}{task_id}-*")
            ]
        removed = [path for path in trash if path is not None]
        for path in [*removed, *leftovers]:
            shutil.rmtree(path, ignore_errors=True)
        if not removed:
            raise NotFound("There is no such task, or no longer", task=task_id)

    def clear(self, task_id: str) -> None:
        """Remove a bundle that a job's process has published after its task was removed.

        The supervisor calls this once the process is gone. On machines that do not share file
        locks, `delete` cannot wait for the process.
        """
        with self._locked():
            if (self.jobs / task_id).exists():
                return
            left = [self._moved_away(self.tasks / task_id)]
            left += self.tasks.glob(f"{PARTIAL}{task_id}-*")
        for path in left:
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)

    def withdraw(self, task_id: str, seen: Signature) -> None:
        """Move a published bundle that cannot be served away, until another replaces it.

        Its job, if any, stays. A bundle with another signature than `seen` stays as well: another
        process has moved the old one away, and this may be its replacement.
        """
        with self._locked():
            if signature(self.tasks / task_id) == seen:
                self._moved_away(self.tasks / task_id, _WITHDRAWN)

    def sweep(self) -> None:
        """Remove the leftovers of killed processes: half-made folders, and folders moved away.

        - Half-made bundles stay while any process writes a bundle.
        - Withdrawn bundles stay until another is in their place.
        - In a fleet, half-made folders stay for an hour.
        """
        with self._locked(), (self.tasks / WRITERS).open("a") as writers:
            left = [path for folder in (self.jobs, self.tasks) for path in folder.glob(".trash-*")]
            left += self._half_made(self.jobs)
            for bundle in _folders(self.tasks):
                left += self.tasks.glob(f"{_WITHDRAWN}{bundle.name}-*")
            if _taken(writers):
                left += self._half_made(self.tasks)
            for path in left:
                shutil.rmtree(path, ignore_errors=True)

    def _open(self) -> list[Path]:
        return [job for job in _folders(self.jobs) if self._is_open(job)]

    def _is_open(self, job: Path) -> bool:
        try:
            return (job / PLAN).is_file() and not job_status(job, self.tasks / job.name).ended
        except (OSError, ValueError, TypeError):
            return False

    def _half_made(self, folder: Path) -> list[Path]:
        before = time.time() - self._spared_seconds
        found = list(folder.glob(f"{PARTIAL}*"))
        return [path for path in found if not self._spared_seconds or _last_change(path) < before]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other processes and threads that make or remove tasks."""
        # The data directory first: mkdir gives parents that it makes the default mode.
        for folder in (self.jobs.parent, self.jobs, self.tasks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.jobs / _LOCK).open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _moved_away(self, folder: Path, prefix: str = ".trash-") -> Path | None:
        """The folder's new path, or None for a missing folder."""
        trash = folder.with_name(f"{prefix}{folder.name}-{time.time_ns()}")
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return None
        flush(folder.parent)
        return trash


def _age(task: Task) -> tuple[float, str]:
    return task.created, task.id


def is_running(job: Path) -> bool:
    """Whether a process runs the job now; nothing is written, since the disk may be full."""
    try:
        with (job / LOCK).open("rb") as stream:
            return not _taken(stream)
    except FileNotFoundError:
        return False


def _taken(stream: IO[Any]) -> bool:
    """Whether the file's lock was free; the stream holds it now."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_until_free(job: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_running(job):
        if time.monotonic() > deadline:
            ids = naming(task_id=job.name)
            logger.error("the process of job %s has not ended", job.name, extra=ids)
            return
        time.sleep(0.02)


def _folders(folder: Path) -> Sequence[Path]:
    return [path for path in folder.iterdir() if is_task_id(path.name)] if folder.is_dir() else []


def _bytes_in(path: Path) -> int:
    """Bytes of a file, or of every file under a folder."""
    return sum(state.st_size for state in _states(path))


def _last_change(folder: Path) -> float:
    """The last change of the folder or of a file in it, in Unix seconds."""
    with suppress(OSError):
        return max([folder.stat().st_mtime, *(state.st_mtime for state in _states(folder))])
    return time.time()


def _states(path: Path) -> Iterator[os.stat_result]:
    """The stat results of a file, or of every file under a folder; vanished files are skipped."""
    for root, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for name in names:
            with suppress(OSError):
                yield (Path(root) / name).lstat()
