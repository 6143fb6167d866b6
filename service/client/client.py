"""Synchronous client of a running service."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from .errors import Busy, DeadlinePassed, ProblemError, Unreachable, problem_of

LONGEST_WAIT = 600
"""Most seconds that the service lets one request wait for its answer."""
_GRACE_SECONDS = 30.0
"""Seconds beyond the wait in which the response must arrive."""


class Client:
    """A connection to the service at `url`; several threads may share it.

    `key` is sent as the bearer key. `timeout` is the patience in seconds for one answer: waiting in
    the service and retries together. Raises ValueError for a malformed `url` or `timeout`.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, timeout: float = 3600.0
    ) -> None:
        if not timeout > 0.0:
            raise ValueError(f"timeout = {timeout}: must be greater than 0 seconds")
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url = {url!r}: must begin with http:// or https://")
        self._timeout = timeout
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        unlimited = httpx.Limits(max_connections=None)
        try:
            self._http = httpx.Client(base_url=url, headers=headers, limits=unlimited)
        except httpx.InvalidURL as error:
            raise ValueError(f"url = {url!r}: {error}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(
        self, image: bytes | str | Path, *, idempotency_key: str | None = None, **question: Any
    ) -> dict[str, Any]:
        """The answer about an image: the JSON document of `POST /predict`.

        `image` is the content of a JPEG, PNG or WebP file, or the path of one. `question` has the
        fields of `POST /predict`: task, mode, sigma (one, or a descending list), alpha, n0, n,
        method, target_radius; a field that is None is left out.

        Waits until the answer is ready. A 429 or 503 is retried after the seconds of its
        Retry-After. All tries share one Idempotency-Key, so they are one job.

        Raises Busy or DeadlinePassed once the patience has ended, Unreachable where no response
        arrives, another ProblemError for any other refusal, and OSError for an unreadable file.
        """
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        fields = {name: _text(value) for name, value in question.items() if value is not None}
        key = idempotency_key or str(uuid.uuid4())
        end = time.monotonic() + self._timeout
        while True:
            wait = max(1, min(LONGEST_WAIT, int(end - time.monotonic())))
            headers = {"Idempotency-Key": key, "Prefer": f"wait={wait}"}
            try:
                return self._send(
                    "POST",
                    "/predict",
                    wait,
                    files={"image": ("image", content)},
                    data=fields,
                    headers=headers,
                )
            except DeadlinePassed:
                if time.monotonic() >= end:
                    raise
            except Busy as busy:
                if busy.retry_after is None or time.monotonic() + busy.retry_after >= end:
                    raise
                time.sleep(busy.retry_after)

    def models(self) -> list[dict[str, Any]]:
        """The tasks that the service answers about, each with its labels: `GET /models`.

        Raises ProblemError and Unreachable as `predict` does; nothing is retried.
        """
        found: list[dict[str, Any]] = self._send("GET", "/models", 0)["models"]
        return found

    def _send(self, method: str, path: str, wait: float, **request: Any) -> dict[str, Any]:
        """The JSON document of a successful response; raises ProblemError and Unreachable."""
        try:
            response = self._http.request(method, path, timeout=wait + _GRACE_SECONDS, **request)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"{self._http.base_url}: {reason}") from error
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        raise _problem(response)


def _text(value: Any) -> str | list[str]:
    """A field's text; a list is a repeated field, and an empty one is left to the server."""
    if isinstance(value, list | tuple):
        return [str(each) for each in value] or ""
    return str(value)


def _problem(response: httpx.Response) -> ProblemError:
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
