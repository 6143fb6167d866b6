"""Tasks as folders on disk: published bundles, and the adaptation jobs that make them.

Other processes may make, run and remove tasks in the same folders at the same time. What is made
or removed here appears or vanishes by one rename, so a process may be killed at any point.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from models.adaptation.plan import LOCK, PLAN, REFERENCES, Plan, Status, write_json
from models.bundle import WRITERS
from models.files import flush
from service.config import Settings
from service.errors import Backlog, NotFound, StorageFull
from service.tasks.task import Signature, Task, is_task_id, signature

logger = logging.getLogger("vouchsafe.tasks")

REFERENCES_SHOWN = 20
RETRY_SECONDS = 60
"""Retry-After of a full queue where the running job has no estimate yet."""
LONGEST_RETRY = 600
CHILD_SECONDS = 10.0
"""How long a removal waits for the job's process to be gone."""
_REFERENCE = re.compile(r"(\d{1,4})-(\d{1,3})\.png")
_PARTIAL = ".partial-"
_WITHDRAWN = ".withdrawn-"
_LARGEST_NAMED = 5
_ENTRIES_READ = 1_000


def retry_after(eta_seconds: float | None, default: int) -> int:
    """Whole seconds, from 1 to 600, after which asking again makes sense."""
    seconds = default if eta_seconds is None else int(eta_seconds) + 1
    return min(max(1, seconds), LONGEST_RETRY)


class Store:
    """The tasks under a data directory; its methods block on the disk.

    `tasks` and `jobs` are the folders of the published bundles and of the adaptation jobs, `models`
    that of the networks that were fetched.
    """

    def __init__(self, settings: Settings, secret: bytes) -> None:
        root = settings.data_dir.resolve()
        self.tasks, self.jobs = root / "tasks", root / "jobs"
        self.models = settings.models_folder
        self._most_bytes = settings.tasks_bytes
        self._most_jobs = settings.queued_tasks
        self._secret = secret

    def create(self, plan: Plan, name: str, owner: str | None) -> Task:
        """The plan's task, queued where there is none and again where it failed.

        Raises StorageFull where tasks take all the room they may and Backlog for too many jobs, of
        all callers or, where callers have keys, of this one: no key may fill more than half.
        """
        task_id = plan.identity(self._secret)
        try:
            with self._alone():
                found = self.find(task_id)
                if found is None or found.status.state in ("failed", "cancelled"):
                    self._check_room(owner)
                if found is None:
                    document = {"plan": asdict(plan), "name": name, "owner": owner}
                    self._publish_job(task_id, document | {"created": time.time()})
                elif found.status.state in ("failed", "cancelled"):
                    again = Status("queued", losses=found.status.losses)
                    again.write(self.jobs / task_id)
                return self.get(task_id)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFull("The disk is full: make room on it, or delete tasks") from error

    def find(self, task_id: str) -> Task | None:
        """The task as it stands, or None."""
        if not is_task_id(task_id):
            return None
        job, bundle = self.jobs / task_id, self.tasks / task_id
        try:
            return Task.of_job(job, bundle) if (job / PLAN).is_file() else Task.of_bundle(bundle)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.error("task %s cannot be read: %s", task_id, error)
            return None

    def get(self, task_id: str) -> Task:
        """The task as it stands; raises NotFound."""
        if (task := self.find(task_id)) is None:
            raise NotFound("There is no such task, or no longer", task=task_id[:64])
        return task

    def all(self) -> list[Task]:
        """Every task, the oldest first."""
        ids = {path.name for folder in (self.tasks, self.jobs) for path in _folders(folder)}
        found = [self.find(task_id) for task_id in ids]
        return sorted((t for t in found if t is not None), key=lambda task: (task.created, task.id))

    def unfinished(self) -> list[Task]:
        """The tasks still to be made, the oldest first."""
        return [task for task in self.all() if not task.status.ended]

    def references(self, task: Task) -> list[str]:
        """File names of at most 20 pictures the task was made from, one of each label first."""
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
        """Bytes that each task takes with its job, leftovers of killed processes included."""
        used: dict[str, int] = {}
        for folder in (self.tasks, self.jobs):
            for path in folder.iterdir() if folder.is_dir() else ():
                used[path.name] = used.get(path.name, 0) + _bytes_in(path)
        return used

    def delete(self, task_id: str) -> None:
        """Remove a task, published or not, and its job; whoever runs the job ends its process.

        Each folder leaves sight by one rename before it is removed. Raises NotFound.
        """
        if not is_task_id(task_id):
            raise NotFound("There is no such task, or no longer", task=task_id[:64])
        with self._alone():
            trash = [self._out_of_sight(self.tasks / task_id)]
            trash.append(job := self._out_of_sight(self.jobs / task_id))
            if job is not None:
                _wait_until_free(job, CHILD_SECONDS)
            trash.append(self._out_of_sight(self.tasks / task_id))  # Published at the last moment.
            leftovers = [
                path
                for prefix in (_PARTIAL, _WITHDRAWN)
                for path in self.tasks.glob(f"{prefix}{task_id}-*")
            ]
        removed = [path for path in trash if path is not None]
        for path in [*removed, *leftovers]:
            shutil.rmtree(path, ignore_errors=True)
        if not removed:
            raise NotFound("There is no such task, or no longer", task=task_id)

    def withdraw(self, task_id: str, seen: Signature) -> None:
        """Put a published bundle that cannot be served aside, until another is in its place.

        Its job, if there is one, stays. A bundle that is not the one `seen` is let be: somebody
        else has put that aside, and this may be what was made instead.
        """
        with self._alone():
            if signature(self.tasks / task_id) == seen:
                self._out_of_sight(self.tasks / task_id, _WITHDRAWN)

    def sweep(self) -> None:
        """Remove what killed processes left: half-made folders, and those out of sight.

        Half-made bundles are let be while any process writes one, and those put aside until there
        is another.
        """
        with self._alone(), (self.tasks / WRITERS).open("a") as writers:
            left = [path for folder in (self.jobs, self.tasks) for path in folder.glob(".trash-*")]
            left += self.jobs.glob(f"{_PARTIAL}*")
            for bundle in _folders(self.tasks):
                left += self.tasks.glob(f"{_WITHDRAWN}{bundle.name}-*")
            if _taken(writers):
                left += self.tasks.glob(f"{_PARTIAL}*")
            for path in left:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While no other process or thread makes or removes tasks."""
        for folder in (self.jobs, self.tasks):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.jobs / ".lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _check_room(self, owner: str | None) -> None:
        unfinished = self.unfinished()
        own = [task for task in unfinished if task.owner == owner]
        most_own = max(1, self._most_jobs // 2)
        if len(unfinished) >= self._most_jobs:
            raise _too_many(unfinished, self._most_jobs, "tasks are being made")
        if owner is not None and len(own) >= most_own:
            raise _too_many(own, most_own, "tasks of this key are being made")
        used = self.usage()
        if (total := sum(used.values())) >= self._most_bytes:
            raise _storage_full(total, self._most_bytes, used)

    def _publish_job(self, task_id: str, document: Mapping[str, Any]) -> None:
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=self.jobs))
        try:
            write_json(partial / PLAN, document)
            flush(partial)
            partial.rename(self.jobs / task_id)
            flush(self.jobs)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _out_of_sight(self, folder: Path, prefix: str = ".trash-") -> Path | None:
        """Where the folder lies now, or None where there was none."""
        trash = folder.with_name(f"{prefix}{folder.name}-{time.time_ns()}")
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return None
        flush(folder.parent)
        return trash


def is_running(job: Path) -> bool:
    """Whether some process runs the job now; nothing is written, for the disk may be full."""
    try:
        with (job / LOCK).open("rb") as stream:
            return not _taken(stream)
    except FileNotFoundError:
        return False


def _taken(stream: IO[Any]) -> bool:
    """Whether nobody held a lock on the file; the stream holds it now."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_until_free(job: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_running(job):
        if time.monotonic() > deadline:
            logger.error("the process of job %s has not ended", job.name)
            return
        time.sleep(0.02)


def _folders(folder: Path) -> Sequence[Path]:
    return [path for path in folder.iterdir() if is_task_id(path.name)] if folder.is_dir() else []


def _bytes_in(path: Path) -> int:
    """Bytes of a file, or of every file under a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for root, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for name in names:
            try:
                total += (Path(root) / name).lstat().st_size
            except OSError:
                continue
    return total


def _too_many(unfinished: Sequence[Task], most: int, what: str) -> Backlog:
    etas = [t.status.eta_seconds for t in unfinished if t.status.eta_seconds is not None]
    return Backlog(
        f"{len(unfinished)} {what}; at most {most} may be",
        retry_after=retry_after(min(etas, default=None), RETRY_SECONDS),
        limit=most,
    )


def _storage_full(used: int, limit: int, by_task: Mapping[str, int]) -> StorageFull:
    largest = sorted(((n, i) for i, n in by_task.items() if is_task_id(i)), reverse=True)
    largest = largest[:_LARGEST_NAMED]
    named = ", ".join(f"{task_id} ({size / 2**20:.1f} MiB)" for size, task_id in largest)
    return StorageFull(
        f"Tasks take {used} bytes; the limit is {limit}. Delete some first: {named}",
        used=used,
        limit=limit,
        largest=[{"task": task_id, "bytes": size} for size, task_id in largest],
    )
