"""What the clients ask of the service, step by step, without connections.

A flow yields the calls and pauses that it needs and is sent each call's response. An error of a
call is thrown into it. `Client` and `AsyncClient` run the same flows.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx

from .errors import (
    Busy,
    Conflict,
    DeadlinePassed,
    ProblemError,
    VouchsafeError,
    problem_of,
)
from .events import Event
from .types import (
    DemonstrationResponse,
    JobResponse,
    ModelResponse,
    PredictResponse,
    SignedCertificate,
    TaskResponse,
    VerificationResponse,
)

LONGEST_WAIT = 600
"""Most seconds that the service lets one request wait for its answer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A request to send; the service may wait for `wait` seconds before it responds."""

    method: str
    path: str
    wait: float = 0.0
    request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    """Seconds to sleep before the next call."""

    seconds: float


Flow = Generator[Call | Pause, httpx.Response | None, T]
Document = dict[str, Any]


def patient(flow: Flow[T], timeout: float) -> Flow[T]:
    """The flow, whose calls that do not wait are sent again where the service is busy.

    Each pauses for the seconds of Retry-After, as long as `timeout` allows. Calls that are sent
    again change nothing twice: POST /tasks finds the task of the same labels.
    """
    end = time.monotonic() + timeout
    response: httpx.Response | None = None
    refused: VouchsafeError | None = None
    while True:
        try:
            step = flow.send(response) if refused is None else flow.throw(refused)
        except StopIteration as ended:
            result: T = ended.value
            return result
        response, refused = None, None
        while True:
            try:
                response = yield step
            except Busy as busy:
                pause = busy.retry_after
                is_waiting = isinstance(step, Call) and step.wait > 0.0
                if is_waiting or pause is None or time.monotonic() + pause >= end:
                    refused = busy
                    break
                yield Pause(pause)
            except VouchsafeError as error:
                refused = error
                break
            else:
                break


def predict(
    content: bytes, timeout: float, idempotency_key: str | None, question: Mapping[str, Any]
) -> Flow[PredictResponse]:
    """The answer about an image, as `_asked` waits for it."""
    answer: PredictResponse = yield from _asked(
        "/predict", content, timeout, idempotency_key, question
    )
    return answer


def demonstrate(
    content: bytes, timeout: float, question: Mapping[str, Any]
) -> Flow[DemonstrationResponse]:
    """The pictures of a demonstration, as `_asked` waits for them."""
    found: DemonstrationResponse = yield from _asked(
        "/demonstrations", content, timeout, None, question
    )
    return found


def _asked(
    path: str, content: bytes, timeout: float, key: str | None, question: Mapping[str, Any]
) -> Flow[Any]:
    """The document about an image; a 202, 429, 503 or 504 is retried as the same job."""
    fields = {name: _text(value) for name, value in question.items() if value is not None}
    key = key or str(uuid.uuid4())
    end = time.monotonic() + timeout
    while True:
        wait = max(1, min(LONGEST_WAIT, int(end - time.monotonic())))
        request = {
            "files": {"image": ("image", content)},
            "data": fields,
            "headers": {"Idempotency-Key": key, "Prefer": f"wait={wait}"},
        }
        try:
            found = _document((yield Call("POST", path, wait, request)))
            if found.get("status") not in ("queued", "running"):
                return found
            if time.monotonic() >= end:
                raise DeadlinePassed(504, {"detail": "The job goes on", "job": found["id"]})
        except DeadlinePassed:
            if time.monotonic() >= end:
                raise
        except Busy as busy:
            if busy.retry_after is None or time.monotonic() + busy.retry_after >= end:
                raise
            yield Pause(busy.retry_after)


def get(path: str) -> Flow[Any]:
    """The document at an address."""
    return _document((yield Call("GET", path)))


def task(id: str) -> Flow[TaskResponse]:
    """A task by its id or name."""
    found: TaskResponse = yield from get(address("tasks", id))
    return found


def job(id: str) -> Flow[JobResponse]:
    """A job's state, and its result or problem."""
    found: JobResponse = yield from get(address("jobs", id))
    return found


def certificate(id: str) -> Flow[SignedCertificate]:
    """A certificate, document and signature."""
    found: SignedCertificate = yield from get(address("certificates", id))
    return found


def verify(certificate: Mapping[str, Any] | str | Path) -> Flow[VerificationResponse]:
    """The service's checks of a certificate; raises OSError for an unreadable file."""
    if isinstance(certificate, Mapping):
        content = json.dumps(certificate).encode()
    else:
        content = Path(certificate).read_bytes()
    request = {"content": content, "headers": {"Content-Type": "application/json"}}
    path = "/certificates/verify"
    found: VerificationResponse = _document((yield Call("POST", path, request=request)))
    return found


def delete(path: str) -> Flow[None]:
    """Remove what is at an address."""
    yield Call("DELETE", path)


def models() -> Flow[list[ModelResponse]]:
    """The tasks that answer questions, each with its labels."""
    found: list[ModelResponse] = (yield from get("/models"))["models"]
    return found


def tasks() -> Flow[list[TaskResponse]]:
    """All tasks that were made from labels, the newest first, page after page."""
    found: list[TaskResponse] = []
    page: str | None = "/tasks"
    while page:
        document = yield from get(page)
        found += document["tasks"]
        page = document.get("next")
    return found


def make_task(labels: Sequence[Any], settings: Mapping[str, Any]) -> Flow[TaskResponse]:
    """The task of these labels, which may not be ready yet."""
    body = {"labels": list(labels), **{k: v for k, v in settings.items() if v is not None}}
    task: TaskResponse = _document((yield Call("POST", "/tasks", request={"json": body})))
    return task


def address(kind: str, id: str, rest: str = "") -> str:
    """The path of a resource; any character may be in its id."""
    return f"/{kind}/{quote(id, safe='')}{rest}"


def ended_task(event: Event) -> TaskResponse | None:
    """The task of its last event, or None before that; raises ProblemError where there is none."""
    if event.kind == "ready":
        return cast(TaskResponse, event.data)
    if event.kind == "problem":
        raise problem_of(int(event.data.get("status", 500)), event.data)
    if event.kind == "cancelled":
        raise Conflict(409, {"detail": "The task was removed", "task": event.data.get("id")})
    return None


def read(image: bytes | str | Path) -> bytes:
    """An image's content; raises OSError for an unreadable file."""
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def failure(response: httpx.Response) -> ProblemError:
    """The exception for a response that is no success."""
    try:
        document = response.json()
    except ValueError:
        document = None
    after = response.headers.get("Retry-After", "")
    return problem_of(
        response.status_code,
        document if isinstance(document, dict) else {},
        float(after) if after.isdecimal() else None,
    )


def _document(response: httpx.Response | None) -> Any:
    return response.json() if response is not None else {}


def _text(value: Any) -> str | list[str]:
    """A field's text; a list is a repeated field, and an empty one is left to the server."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [str(each) for each in value] or ""
    return str(value)
