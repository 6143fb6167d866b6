"""Exceptions of the client: one type for each way in which the service refuses or fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class VouchsafeError(Exception):
    """The base of every exception that the client raises for an answer it did not get."""


class Unreachable(VouchsafeError):
    """No answer arrived: the connection failed, ended early, or timed out."""


class ProblemError(VouchsafeError):
    """The service answered with a problem document (RFC 9457).

    `document` is that document; `status` is the HTTP status, and `slug` the end of the document's
    type, such as `invalid-field`, or empty for a body that is no problem document. `retry_after`
    is in seconds, None without that header.
    """

    def __init__(
        self, status: int, document: Mapping[str, Any], retry_after: float | None = None
    ) -> None:
        self.status = status
        self.document = dict(document)
        self.retry_after = retry_after
        self.slug = str(self.document.get("type", "")).rpartition(":")[2]
        reason = self.document.get("detail") or self.document.get("title") or "no problem document"
        super().__init__(f"{status}: {reason}")


class InvalidRequest(ProblemError):
    """The request cannot be answered as it is: a field, the image, or its size is refused."""


class Unauthorized(ProblemError):
    """The key is missing, unknown, or may not do this."""


class NotFound(ProblemError):
    """The task, job or address does not exist for this key."""


class Conflict(ProblemError):
    """The task has failed or its name is ambiguous, or the job was cancelled."""


class Busy(ProblemError):
    """The service takes no more work now, and the client's patience has ended."""


class DeadlinePassed(ProblemError):
    """The answer was not ready in time; the job `document["job"]` goes on."""


class ServiceFailed(ProblemError):
    """The service failed; repeating the request may not help."""


_BY_STATUS: Mapping[int, type[ProblemError]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    429: Busy,
    503: Busy,
    504: DeadlinePassed,
}


def problem_of(
    status: int, document: Mapping[str, Any], retry_after: float | None = None
) -> ProblemError:
    """The exception for a response with this status, of at least 300."""
    default = ServiceFailed if status >= 500 else InvalidRequest
    return _BY_STATUS.get(status, default)(status, document, retry_after)
