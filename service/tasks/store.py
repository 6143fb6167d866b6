"""The tasks on disk, for those who may make new ones: within bounds, under ids of the secret."""

from __future__ import annotations

import errno
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.adaptation.plan import PLAN, Plan, Status, write_json
from models.files import flush, written_once
from service.config import Settings
from service.errors import Backlog, StorageFull
from service.tasks.repository import PARTIAL, TaskRepository
from service.tasks.task import Task, is_task_id

RETRY_SECONDS = 60
"""Retry-After of a full queue where the running job has no estimate yet."""
LONGEST_RETRY = 600
VOLUME = ".volume"
"""The file beside the jobs with the id of one fleet's folders."""
_LARGEST_NAMED = 5


def retry_after(eta_seconds: float | None, default: int) -> int:
    """Whole seconds, from 1 to 600, after which asking again makes sense."""
    seconds = default if eta_seconds is None else int(eta_seconds) + 1
    return min(max(1, seconds), LONGEST_RETRY)


class Store(TaskRepository):
    """The tasks under a data directory, where new ones can be made; see TaskRepository.

    The secret makes their ids, so that nobody can guess one.
    """

    def __init__(self, settings: Settings, secret: bytes) -> None:
        super().__init__(settings)
        self._most_bytes = settings.task_storage_bytes
        self._most_jobs = settings.max_pending_tasks
        self._secret = secret

    def volume(self) -> str:
        """The id of these folders, made where they have none; raises OSError."""
        self.jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path := self.jobs / VOLUME).exists():
            written_once(path, secrets.token_hex(16).encode())
        return path.read_text("ascii")

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
                    document = {"plan": plan.document, "name": name, "owner": owner}
                    self._publish_job(task_id, document | {"created": time.time()})
                elif found.status.state in ("failed", "cancelled"):
                    again = Status("queued", losses=found.status.losses)
                    again.write(self.jobs / task_id)
                return self.get(task_id)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFull("The disk is full: make room on it, or delete tasks") from error

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
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.jobs))
        try:
            write_json(partial / PLAN, document)
            flush(partial)
            partial.rename(self.jobs / task_id)
            flush(self.jobs)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            # A machine that does not share our locks has just made the same task.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


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
