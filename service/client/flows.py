"""What the clients ask of the service, step by step, without connections.

A flow yields the calls and pauses that it needs and is sent each call's response. An error of a
call is thrown into it. `Client` and `AsyncClient` run the same flows.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import quote

import httpx

from .errors import Busy, Conflict, DeadlinePassed, ProblemError, Unreachable, problem_of
from .events import Event
from .types import (
    BatchResponse,
    DemonstrationResponse,
    JobResponse,
    ModelResponse,
    PredictResponse,
    SignedCertificate,
    TaskResponse,
)

LONGEST_WAIT = 600
"""Most seconds that the service lets one request wait for its answer."""

RECONNECT_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Pauses before a call whose connection failed is sent again; then the failure is raised."""

T = TypeVar("T")


class Patience(NamedTuple):
    """The seconds that a caller has for one answer, retries included, by a monotonic clock."""

    seconds: float
    clock: Callable[[], float] = time.monotonic


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


def retried(call_of: Callable[[int], Call], patience: Patience) -> Flow[Any]:
    """The document that a call's response has; `call_of` takes the seconds that it may wait.

    Retries a 429 or 503 after its Retry-After, a failed connection after RECONNECT_SECONDS, and
    a 504 of a call that waits at once. Raises the last error once the patience has ended.
    """
    clock, reconnects = patience.clock, iter(RECONNECT_SECONDS)
    end = clock() + patience.seconds
    while True:
        call = call_of(max(1, min(LONGEST_WAIT, int(end - clock()))))
        try:
            response = yield call
            return response.json() if response is not None else {}
        except DeadlinePassed:
            if not call.wait or clock() >= end:
                raise
        except (Busy, Unreachable) as error:
            pause = error.retry_after if isinstance(error, Busy) else next(reconnects, None)
            if pause is None or clock() + pause >= end:
                raise
            yield Pause(pause)


Files = Sequence[tuple[str, tuple[str, bytes]]]
"""A form's files: the field, and the name and the content of each."""


def form(
    path: str,
    files: Files,
    patience: Patience,
    idempotency_key: str | None,
    question: Mapping[str, Any],
) -> Flow[Any]:
    """The document in answer to a form; all tries have one Idempotency-Key."""
    fields = {name: _text(value) for name, value in question.items() if value is not None}
    key = idempotency_key or str(uuid.uuid4())

    def call_of(wait: int) -> Call:
        headers = {"Idempotency-Key": key, "Prefer": f"wait={wait}"}
        return Call("POST", path, wait, {"files": files, "data": fields, "headers": headers})

    return (yield from retried(call_of, patience))


def predict(
    content: bytes, patience: Patience, idempotency_key: str | None, question: Mapping[str, Any]
) -> Flow[PredictResponse]:
    """The answer about an image."""
    files = [("image", ("image", content))]
    answer: PredictResponse = yield from form(
        "/predict", files, patience, idempotency_key, question
    )
    return answer


def demonstrate(
    content: bytes, patience: Patience, idempotency_key: str | None, question: Mapping[str, Any]
) -> Flow[DemonstrationResponse]:
    """A finished demonstration about an image; an unfinished one is requested again."""
    clock, key = patience.clock, idempotency_key or str(uuid.uuid4())
    end = clock() + patience.seconds
    files = [("image", ("image", content))]
    while True:
        left = Patience(end - clock(), clock)
        found: DemonstrationResponse = yield from form(
            "/demonstrations", files, left, key, question
        )
        if found["status"] not in ("queued", "running"):
            return found
        if clock() >= end:
            detail = (
                f"The demonstration {found['id']} is {found['status']} after {patience.seconds} s"
            )
            raise DeadlinePassed(504, {"detail": detail, "job": found["id"]})


def batch(files: Files, patience: Patience, question: Mapping[str, Any]) -> Flow[BatchResponse]:
    """The batch of these images, which has only begun."""
    begun: BatchResponse = yield from form("/batches", files, patience, None, question)
    return begun


def get(path: str, patience: Patience) -> Flow[Any]:
    """The document at an address."""
    return (yield from retried(lambda _: Call("GET", path), patience))


def task(id: str, patience: Patience) -> Flow[TaskResponse]:
    """A task by its id or name."""
    found: TaskResponse = yield from get(address("tasks", id), patience)
    return found


def job(id: str, patience: Patience) -> Flow[JobResponse]:
    """A job's state, and its result or problem."""
    found: JobResponse = yield from get(address("jobs", id), patience)
    return found


def certificate(id: str, patience: Patience) -> Flow[SignedCertificate]:
    """A certificate, document and signature."""
    found: SignedCertificate = yield from get(address("certificates", id), patience)
    return found


def delete(path: str) -> Flow[None]:
    """Remove what is at an address."""
    yield Call("DELETE", path)


def models(patience: Patience) -> Flow[list[ModelResponse]]:
    """The tasks that answer questions, each with its labels."""
    found: list[ModelResponse] = (yield from get("/models", patience))["models"]
    return found


def tasks(patience: Patience) -> Flow[list[TaskResponse]]:
    """All tasks that were made from labels, the newest first, page after page."""
    found: list[TaskResponse] = []
    page: str | None = "/tasks"
    while page:
        document = yield from get(page, patience)
        found += document["tasks"]
        page = document.get("next")
    return found


def make_task(
    labels: Sequence[Any], patience: Patience, settings: Mapping[str, Any]
) -> Flow[TaskResponse]:
    """The task of these labels, which may not be ready yet; the same labels are the same task."""
    body = {"labels": list(labels), **{k: v for k, v in settings.items() if v is not None}}
    made: TaskResponse = yield from retried(
        lambda _: Call("POST", "/tasks", request={"json": body}), patience
    )
    return made


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


def _text(value: Any) -> str | list[str]:
    """A field's text; a list is a repeated field, and an empty one is left to the server."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [str(each) for each in value] or ""
    return str(value)
