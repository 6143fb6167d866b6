"""Problems: every error the service reports, as RFC 9457 documents with a stable `type`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

MOST_SHOWN = 80
"""Most characters of a caller's value in a problem."""


def cut(text: str) -> str:
    """The text, or the beginning of one that is too long to be shown."""
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def as_json(value: object) -> str:
    """A caller's value as a detail shows it: JSON, of 80 characters at most."""
    return cut(json.dumps(value, ensure_ascii=False))


class Problem(Exception):
    """An error with a status, a stable type and a title; `detail` says what to change.

    `extra` members join the document (`job`, `limit`, ...); `retry_after` is in whole seconds.
    """

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal"
    title: ClassVar[str] = "The service failed"

    def __init__(self, detail: str, *, retry_after: int | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.extra = extra

    def document(self) -> dict[str, Any]:
        """The `application/problem+json` body."""
        return {
            "type": f"urn:vouchsafe:problem:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.extra,
        }


class MalformedRequest(Problem):
    """The request breaks its own format, or ended before its body did."""

    status, slug, title = 400, "malformed-request", "The request cannot be read"


class InvalidField(Problem):
    """A field of the request is missing or outside its limits."""

    status, slug, title = 422, "invalid-field", "A field is not acceptable"


class InvalidImage(Problem):
    """The bytes are not an image that can be certified."""

    status, slug, title = 422, "invalid-image", "The image cannot be used"


class UnsupportedMedia(Problem):
    """Neither a form nor JSON, or an image format that is not read."""

    status, slug, title = 415, "unsupported-media-type", "The media type is not supported"


class TooLarge(Problem):
    """More bytes or pixels than the service accepts."""

    status, slug, title = 413, "too-large", "The request is too large"


class Unauthorized(Problem):
    """No key, or an unknown one."""

    status, slug, title = 401, "unauthorized", "A valid key is needed"


class Forbidden(Problem):
    """The thing is there to be seen, but not the caller's to change."""

    status, slug, title = 403, "forbidden", "The caller may not do this"


class NotFound(Problem):
    """No such job, task or page, or not the caller's."""

    status, slug, title = 404, "not-found", "There is no such thing here"


class MethodNotAllowed(Problem):
    """The address exists, but not for this method."""

    status, slug, title = 405, "method-not-allowed", "The method is not allowed here"


class IdempotencyMismatch(Problem):
    """The same Idempotency-Key came with another body."""

    status, slug, title = 422, "idempotency-key-reused", "The Idempotency-Key was used before"


class Backlog(Problem):
    """The backlog is full, or no worker is alive."""

    status, slug, title = 503, "backlog", "The service cannot take more work now"


class EngineUnavailable(Problem):
    """What stands between the door and the workers is out of reach."""

    status, slug, title = 503, "engine-unavailable", "The service cannot reach its queue"


class QuotaExceeded(Problem):
    """The key has as many rows waiting as one key may; `limit` says how many."""

    status, slug, title = 429, "quota", "This key has too much work waiting"


class Overloaded(Problem):
    """Open requests, event streams or bodies in memory are at their limit, over all callers."""

    status, slug, title = 503, "overloaded", "The service has too much open at once"


class TooManyOpen(Problem):
    """One key has half of what may be open at once; `limit` says how much that is."""

    status, slug, title = 429, "too-many-open", "This key has too much open at once"


class BodyTimeout(Problem):
    """The request's body did not arrive in time; the server closes the connection."""

    status, slug, title = 503, "body-timeout", "The body did not arrive in time"
    headers: ClassVar[Mapping[str, str]] = {"Connection": "close"}


class HostRefused(Problem):
    """The `Host` header names neither this machine nor a host that the settings allow."""

    status, slug, title = 421, "host-refused", "The host is not answered here"


class OriginRefused(Problem):
    """A page of another origin sent a request that changes something."""

    status, slug, title = 403, "origin-refused", "The origin may not do this"


class StorageFull(Problem):
    """Tasks and their jobs fill the room they may take; `used` and `limit` are in bytes."""

    status, slug, title = 507, "storage-full", "There is no room for another task"


class TaskNotReady(Problem):
    """The task is still being made; `state`, `stage` and `progress` say how far it is."""

    status, slug, title = 503, "task-not-ready", "The task is not ready yet"


class TaskAmbiguous(Problem):
    """The name is that of several tasks; `tasks` are their ids."""

    status, slug, title = 409, "task-ambiguous", "Several tasks have this name"


class TaskFailed(Problem):
    """The task could not be made; `problem` is why."""

    status, slug, title = 409, "task-failed", "The task could not be made"


class AdaptationFailed(Problem):
    """An adaptation job that ended without a bundle; `kind` says what stood in its way."""

    status, slug, title = 500, "adaptation-failed", "The adaptation failed"


class TaskUnusable(Problem):
    """The task's bundle is there, but its networks cannot be loaded from it."""

    status, slug, title = 500, "task-unusable", "The task's networks cannot be loaded"


class DeadlinePassed(Problem):
    """The wait ended before the answer; the job goes on."""

    status, slug, title = 504, "deadline", "The answer was not ready in time"


class JobCancelled(Problem):
    """The job was cancelled before it was done."""

    status, slug, title = 409, "cancelled", "The job was cancelled"


class JobLost(Problem):
    """The queue no longer has a job that was accepted; its rows are gone."""

    status, slug, title = 503, "job-lost", "The job was lost"


class ShardDead(Problem):
    """A shard failed too often; its job cannot be answered."""

    status, slug, title = 500, "shard-dead", "The job failed"


class JobFailed(Problem):
    """A job that ended with a problem of its own, told again as the engine keeps it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(str(document["detail"]))
        self._document = dict(document)

    def document(self) -> dict[str, Any]:
        """The problem the job ended with."""
        return dict(self._document)
