"""Tasks for callers: the state on disk, together with the catalog of this process."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from models.adaptation.plan import Status
from service.errors import (
    AdaptationFailed,
    Forbidden,
    NotFound,
    TaskAmbiguous,
    TaskFailed,
    TaskNotReady,
    as_json,
)
from service.tasks.catalog import Catalog, RefusedBundle
from service.tasks.schemas import TaskRequest, TaskResponse, TasksResponse
from service.tasks.store import Store, retry_after
from service.tasks.task import Task, task_status
from service.validation import invalid_field

RETRY_SECONDS = 10
"""Retry-After of a task without an estimate."""
WATCH_SECONDS = 0.5


class TaskService:
    """Makes, describes and removes tasks, without HTTP."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog

    async def create(self, request: TaskRequest, owner: str | None) -> TaskResponse:
        """The task of these labels and settings, made if necessary.

        A failed task is tried again, and a task with a damaged bundle is made again. Raises
        InvalidField, StorageFull and Backlog.
        """
        plan = await asyncio.to_thread(request.plan, self._store.models)
        made = plan, request.name_of(plan), owner
        task = await asyncio.to_thread(self._store.create, *made)
        refusal = await self._refusal(task)
        if refusal is not None and refusal.replaceable:
            await asyncio.to_thread(self._store.withdraw, task.id, refusal.seen)
            await self._catalog.refresh()
        if task.status.state == "ready" and task.id not in self._catalog:
            # Its bundle was withdrawn, here or by a concurrent request for the same task.
            task = await asyncio.to_thread(self._store.create, *made)
        return await self._response(task)

    async def resolve(self, task: str) -> str:
        """The id of the task with this id or, failing that, this name; else `task` itself.

        A name means the ready tasks that have it, or else the others. Raises TaskAmbiguous for a
        name of several tasks.
        """
        if task in self._catalog or await asyncio.to_thread(self._store.find, task) is not None:
            return task
        name = unicodedata.normalize("NFC", task).strip()
        if not name:
            return task
        ids = [task_id for task_id, bundle in self._catalog.items() if bundle.name == name]
        if not ids:
            ids = [t.id for t in await asyncio.to_thread(self._store.all) if t.name == name]
        if len(ids) > 1:
            detail = (
                f"{len(ids)} tasks are called {as_json(name)}; request one by id: {', '.join(ids)}"
            )
            raise TaskAmbiguous(detail, tasks=ids)
        return ids[0] if ids else task

    async def get(self, task_id: str) -> TaskResponse:
        """The task's state; raises NotFound. A ready task is served."""
        return await self._response(await asyncio.to_thread(self._store.get, task_id))

    async def page(self, limit: int, after: str | None) -> TasksResponse:
        """At most `limit` tasks, the newest first, beginning behind the task `after`.

        Raises InvalidField if `after` is not the id of a task.
        """
        tasks = (await asyncio.to_thread(self._store.all))[::-1]
        ids = [task.id for task in tasks]
        if after is not None and after not in ids:
            detail = "after must be the id of a task that is there; begin with the first page again"
            raise invalid_field("after", detail, after)
        start = 0 if after is None else ids.index(after) + 1
        more = len(tasks) > start + limit
        return TasksResponse(
            tasks=[await self._response(task) for task in tasks[start : start + limit]],
            next=f"/tasks?limit={limit}&after={ids[start + limit - 1]}" if more else None,
        )

    async def reference(self, task_id: str, name: str) -> bytes:
        """One picture's PNG file; raises NotFound."""
        return await asyncio.to_thread(self._store.reference, task_id, name)

    async def watch(self, task: TaskResponse) -> AsyncIterator[TaskResponse | None]:
        """The task, again after every change, until it has ended; None once it was removed."""
        yield task
        while task.state in ("queued", "running"):
            await asyncio.sleep(WATCH_SECONDS)
            before = task
            try:
                task = await self.get(task.id)
            except NotFound:
                yield None
                return
            if task != before:
                yield task

    async def delete(self, task_id: str, owner: str | None) -> None:
        """Remove the task and end its job.

        Raises NotFound, and Forbidden for the built-in task and for tasks of other callers.
        """
        if task_id == "default":
            raise Forbidden("The default task ships with the project and cannot be deleted")
        task = await asyncio.to_thread(self._store.get, task_id)
        if task.owner != owner:
            raise Forbidden(
                "Only the key that made a task may delete it; the operator has `vouchsafe models "
                "remove`",
                task=task_id,
            )
        await asyncio.to_thread(self._store.delete, task_id)
        await self._catalog.refresh()

    async def expect(self, task: str) -> str:
        """The id of a task that is served now or unknown; see `resolve`.

        Raises TaskNotReady for a task that is being made, TaskFailed for a failed one, and
        TaskAmbiguous.
        """
        task_id = await self.resolve(task)
        found = await asyncio.to_thread(self._store.find, task_id)
        if task_id not in self._catalog and found is not None:
            await self._check_ready(found)
        return task_id

    async def _check_ready(self, task: Task) -> None:
        status, name = await self._status(task), as_json(task.name)
        if status.state in ("failed", "cancelled"):
            problem = _problem(status)
            why = problem["detail"] if problem else "its bundle is gone; post it again"
            detail = f"The task {name} could not be made: {why}"
            raise TaskFailed(detail, task=task.id, problem=problem)
        if status.state != "ready":
            raise TaskNotReady(
                f"The task {name} is {status.state}, {status.progress:.0%} done",
                retry_after=retry_after(status.eta_seconds, RETRY_SECONDS),
                task=task.id,
                state=status.state,
                stage=status.stage,
                progress=status.progress,
            )
        if (reason := self._catalog.unread.get(task.id)) is not None:
            detail = f"The task {name} cannot be read now: {reason}"
            raise TaskNotReady(detail, retry_after=RETRY_SECONDS, task=task.id, state=status.state)

    async def _response(self, task: Task) -> TaskResponse:
        names = await asyncio.to_thread(self._store.references, task)
        status = await self._status(task)
        return TaskResponse(
            **asdict(status) | {"problem": _problem(status)},
            id=task.id,
            name=task.name,
            labels=list(task.labels),
            prompts=dict(task.prompts),
            template=task.template,
            settings=dict(task.settings),
            created=task.created,
            references=[f"/tasks/{task.id}/references/{name}" for name in names],
        )

    async def _status(self, task: Task) -> Status:
        """The task's status; failed if this process does not serve its bundle."""
        if (refusal := await self._refusal(task)) is None:
            return task.status
        advice = "Post the same task to make it again"
        if not refusal.replaceable:
            advice = "Another release of the service made it; delete it, or go back to that one"
        elif "steps" not in task.settings:  # Of networks that were added, not adapted.
            advice = "`vouchsafe models remove` and `add` make it again"
        reason = f"Its bundle is not served: {refusal.reason}. {advice}"
        return task_status(task.status, is_published=True, refusal=reason)

    async def _refusal(self, task: Task) -> RefusedBundle | None:
        """The reason why a published task is not served, or None; a new task is read now."""
        if task.status.state != "ready":
            return None
        if task.id not in self._catalog and task.id not in self._catalog.refused:
            await self._catalog.refresh()
        return self._catalog.refused.get(task.id)


def _problem(status: Status) -> dict[str, Any] | None:
    if status.state != "failed":
        return None
    described = {"kind": "internal", "detail": "The adaptation failed", **(status.problem or {})}
    return AdaptationFailed(str(described["detail"]), kind=described["kind"]).document()
