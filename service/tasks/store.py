"""The tasks on disk with their making: within limits, under ids derived from the secret."""

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
"""Retry-After of a full queue while the running job has no estimate."""
LONGEST_RETRY = 600
VOLUME = ".volume"
"""The file beside the jobs with the id of a fleet's data directory."""
_LARGEST_NAMED = 5


def retry_after(eta_seconds: float | None, default: int) -> int:
    """Whole seconds, from 1 to 600, after which a caller should retry."""
    seconds = default if eta_seconds is None else int(eta_seconds) + 1
    return min(max(1, seconds), LONGEST_RETRY)


class Store(TaskRepository):
    """The tasks under a data directory, where new ones can be made; see TaskRepository.

    Ids are derived from the `secret`, so that callers cannot guess them.
    """

    def __init__(self, settings: Settings, secret: bytes) -> None:
        super().__init__(settings)
        self._max_bytes = settings.task_storage_bytes
        self._max_jobs = settings.max_pending_tasks
        self._secret = secret

    def volume(self) -> str:
        """The id of this data directory, made on first use; raises OSError."""
        self.jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path := self.jobs / VOLUME).exists():
            written_once(path, secrets.token_hex(16).encode())
        return path.read_text("ascii")

    def create(self, plan: Plan, name: str, owner: str | None) -> Task:
        """The plan's task; a new or a failed one is queued.

        Raises StorageFull at the limit of storage, and Backlog at the limit of jobs, which is half
        for one key.
        """
        task_id = plan.identity(self._secret)
        try:
            with self._locked():
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
        max_own = max(1, self._max_jobs // 2)
        if len(unfinished) >= self._max_jobs:
            raise _too_many(unfinished, self._max_jobs, "tasks are being made")
        if owner is not None and len(own) >= max_own:
            raise _too_many(own, max_own, "tasks of this key are being made")
        used = self.usage()
        if (total := sum(used.values())) >= self._max_bytes:
            raise _storage_full(total, self._max_bytes, used)

    def _publish_job(self, task_id: str, document: Mapping[str, Any]) -> None:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.jobs))
        try:
            write_json(partial / PLAN, document)
            flush(partial)
            partial.rename(self.jobs / task_id)
            flush(self.jobs)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            # Another machine may make the same task, without sharing our file locks.
            if not isinstance(error, OSError) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def _too_many(unfinished: Sequence[Task], limit: int, description: str) -> Backlog:
    etas = [t.status.eta_seconds for t in unfinished if t.status.eta_seconds is not None]
    return Backlog(
        f"{len(unfinished)} {description}; at most {limit} may be",
        retry_after=retry_after(min(etas, default=None), RETRY_SECONDS),
        limit=limit,
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
