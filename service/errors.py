"""Problems: the errors that the service reports, as RFC 9457 documents with a stable `type`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

MOST_SHOWN = 80
"""Most characters of a caller's value in a problem."""


def cut(text: str) -> str:
    """The text, cut to MOST_SHOWN characters."""
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def as_json(value: object) -> str:
    """A caller's value for a detail: JSON, cut to 80 characters."""
    return cut(json.dumps(value, ensure_ascii=False))


class Problem(Exception):
    """An error with a status, a stable type and a title; `detail` states what to change.

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
    """The body is neither a form in UTF-8 nor JSON, or the image has an unsupported format."""

    status, slug, title = 415, "unsupported-media-type", "The media type is not supported"


class TooLarge(Problem):
    """More bytes, pixels or images than the service accepts."""

    status, slug, title = 413, "too-large", "The request is too large"


class Unauthorized(Problem):
    """No key, or an unknown one."""

    status, slug, title = 401, "unauthorized", "A valid key is needed"


class Forbidden(Problem):
    """Another key made the task; the caller may see it, but not change it."""

    status, slug, title = 403, "forbidden", "The caller may not do this"


class NotFound(Problem):
    """No such job, demonstration, batch, certificate, task or page, or that of another caller."""

    status, slug, title = 404, "not-found", "There is no such thing here"


class MethodNotAllowed(Problem):
    """The address does not support this method."""

    status, slug, title = 405, "method-not-allowed", "The method is not allowed here"


class IdempotencyMismatch(Problem):
    """The same Idempotency-Key came with another body."""

    status, slug, title = 422, "idempotency-key-reused", "The Idempotency-Key was used before"


class Backlog(Problem):
    """The queue is full, or no live worker serves the task."""

    status, slug, title = 503, "backlog", "The service cannot take more work now"


class EngineUnavailable(Problem):
    """The queue between the API and the workers is unreachable."""

    status, slug, title = 503, "engine-unavailable", "The service cannot reach its queue"


class QuotaExceeded(Problem):
    """The key's waiting rows have reached their `limit`."""

    status, slug, title = 429, "quota", "This key has too much work waiting"


class Overloaded(Problem):
    """Open requests, event streams or bodies of all callers have reached their limit."""

    status, slug, title = 503, "overloaded", "The service has too much open at once"


class TooManyOpen(Problem):
    """One key has reached its `limit`, which is half of what may be open at once."""

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
    """Tasks and their jobs have reached their limit of storage; `used` and `limit` are in bytes."""

    status, slug, title = 507, "storage-full", "There is no room for another task"


class TaskNotReady(Problem):
    """The task is being made; `state`, `stage` and `progress` give its progress."""

    status, slug, title = 503, "task-not-ready", "The task is not ready yet"


class TaskAmbiguous(Problem):
    """Several tasks have this name; `tasks` are their ids."""

    status, slug, title = 409, "task-ambiguous", "Several tasks have this name"


class TaskFailed(Problem):
    """The task could not be made; `problem` is the reason."""

    status, slug, title = 409, "task-failed", "The task could not be made"


class AdaptationFailed(Problem):
    """The adaptation job ended without a bundle; `kind` is the kind of failure."""

    status, slug, title = 500, "adaptation-failed", "The adaptation failed"


class TaskUnusable(Problem):
    """The task's bundle exists, but its networks cannot be loaded from it."""

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
    """A shard failed too often, so its job failed."""

    status, slug, title = 500, "shard-dead", "The job failed"


class JobFailed(Problem):
    """A job ended with this problem, as the engine stores it."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(str(document["detail"]))
        self._document = dict(document)

    def document(self) -> dict[str, Any]:
        """The problem with which the job ended."""
        return dict(self._document)
