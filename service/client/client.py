"""Synchronous client of a running service."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx

from . import flows
from .connection import EVENTS_SECONDS, GRACE_SECONDS, checked, options
from .errors import Unreachable, VouchsafeError
from .events import Event, EventParser
from .flows import Call, Document, Flow, Patience
from .many import Answer, Questions, saving
from .types import (
    DemonstrationResponse,
    JobResponse,
    ModelResponse,
    PredictResponse,
    SignedCertificate,
    TaskResponse,
    VerificationResponse,
)
from .verification import Certificate, verified

T = TypeVar("T")


class Client:
    """A connection to the service at `url`; several threads may share it.

    `key` is sent as the bearer key. `timeout` is the patience in seconds for one answer: waiting in
    the service and retries together. Raises ValueError for a malformed `url` or `timeout`.

    Methods raise ProblemError for a refusal, by its kind, and Unreachable where no response
    arrives. Before that, reads and posts are sent again: after the seconds of Retry-After with a
    429 or 503, and four times after a failed connection. All tries of a post have one
    Idempotency-Key, so they are one job.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, timeout: float = 3600.0
    ) -> None:
        self._patience = Patience(checked(url, timeout))
        try:
            self._http = httpx.Client(**options(url, key))
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
    ) -> PredictResponse:
        """The answer about an image: the JSON document of `POST /predict`.

        `image` is the content of a JPEG, PNG or WebP file, or the path of one. `question` has the
        fields of `POST /predict`: task, mode, sigma (one, or a descending list), alpha, n0, n,
        method, target_radius; a field that is None is left out.

        Waits until the answer is ready. Raises Busy or DeadlinePassed once the patience has ended,
        and OSError for an unreadable file.
        """
        content = flows.read(image)
        return self._run(flows.predict(content, self._patience, idempotency_key, question))

    def predict_many(
        self,
        images: str | Path | Iterable[str | Path],
        *,
        at_once: int = 8,
        family_alpha: float | None = None,
        manifest: str | Path | None = None,
        out: str | Path | None = None,
        on_answer: Callable[[Answer], None] | None = None,
        **question: Any,
    ) -> Iterator[Answer]:
        """The answers about a folder's pictures or about files, each as it comes.

        `at_once` questions are in the service at a time. With `family_alpha` each image has its
        share of it as alpha, so that all answers hold together. `out` is a file to write, JSON
        lines or CSV by its suffix. A picture without an answer has an `error` in its place.

        `manifest`, beside `family_alpha`, is a file to write too: the service then gets all
        pictures as one batch (`POST /batches`) and signs the list of its certificates. The
        service's limits take the place of `at_once`. Closing the iterator early erases the batch.

        Raises ValueError for no pictures, an unknown suffix, alpha beside family_alpha, and
        manifest without it; Unreachable where the results of a batch end early.
        """
        asked = Questions.of(images, family_alpha, question, manifest is not None)
        found = self._each(asked, at_once) if manifest is None else self._batch(asked, manifest)
        with saving(out) as save, closing(found) as answers:
            for answer in answers:
                save(answer)
                if on_answer is not None:
                    on_answer(answer)
                yield answer

    def demonstrate(
        self,
        image: bytes | str | Path,
        kind: Literal["rows", "attack"] = "rows",
        *,
        idempotency_key: str | None = None,
        **question: Any,
    ) -> DemonstrationResponse:
        """What the networks see of an image, or an attack on it, which proves nothing.

        `question` has the other fields of `POST /demonstrations`: task, sigma, epsilon. Pictures
        are PNGs, as `data:` addresses. Waits until they are ready, and raises as `predict` does.
        """
        content, asked = flows.read(image), {**question, "kind": kind}
        return self._run(flows.demonstrate(content, self._patience, idempotency_key, asked))

    def models(self) -> list[ModelResponse]:
        """The tasks that the service answers about, each with its labels: `GET /models`."""
        return self._run(flows.models(self._patience))

    def tasks(self) -> list[TaskResponse]:
        """The tasks that were made from labels, the newest first: `GET /tasks`."""
        return self._run(flows.tasks(self._patience))

    def task(self, id: str) -> TaskResponse:
        """A task by its id, or by a name that no other task has: `GET /tasks/{id}`."""
        return self._run(flows.task(id, self._patience))

    def make_task(self, labels: Sequence[Any], **settings: Any) -> TaskResponse:
        """A task from labels, words or `{"label", "prompt"}`: `POST /tasks`.

        `settings` are its other fields, such as name, template and shots. The task may not be ready
        yet: see `wait_for_task`.
        """
        return self._run(flows.make_task(labels, self._patience, settings))

    def wait_for_task(
        self, id: str, on_progress: Callable[[Document], None] | None = None
    ) -> TaskResponse:
        """The task once it is ready; raises ProblemError where it fails, Conflict once removed."""
        for event in self.task_events(id):
            if (task := flows.ended_task(event)) is not None:
                return task
            if on_progress is not None:
                on_progress(event.data)
        raise Unreachable(f"the events of task {id} ended before it was ready")

    def delete_task(self, id: str) -> None:
        """Remove a task of this key: `DELETE /tasks/{id}`."""
        self._run(flows.delete(flows.address("tasks", id)))

    def job(self, id: str) -> JobResponse:
        """A job's state, progress, and result or problem: `GET /jobs/{id}`."""
        return self._run(flows.job(id, self._patience))

    def delete_job(self, id: str) -> None:
        """Cancel and erase a job: `DELETE /jobs/{id}`."""
        self._run(flows.delete(flows.address("jobs", id)))

    def certificate(self, id: str) -> SignedCertificate:
        """The certificate of an answer, document and signature: `GET /certificates/{id}`."""
        return self._run(flows.certificate(id, self._patience))

    def public_keys(self) -> Document:
        """The JWKS that verifies certificates: `GET /.well-known/jwks.json`."""
        return self._run(flows.get("/.well-known/jwks.json", self._patience))

    def verify(
        self,
        certificate: Certificate,
        jwks: str | Path | Mapping[str, Any] | None = None,
        *,
        image: bytes | str | Path | None = None,
    ) -> VerificationResponse:
        """The checks of a certificate, made on this machine; `passed` where none of them failed.

        `certificate` is a path, a document with its signature, or an answer that holds one. `jwks`
        are the keys to trust, a document or a path; without them those of this service are fetched.
        With `image` the checks include that the certificate is about it.

        Raises ValueError for what is no certificate and for a malformed `jwks`, OSError for an
        unreadable file, and ImportError where the verifier's libraries are missing.
        """
        return verified(certificate, self.public_keys() if jwks is None else jwks, image)

    def job_events(self, id: str) -> Iterator[Event]:
        """A job's events as they come; the last is its `result` or `problem`."""
        return self._events(flows.address("jobs", id, "/events"))

    def task_events(self, id: str) -> Iterator[Event]:
        """A task's events as they come; the last is `ready`, `problem` or `cancelled`."""
        return self._events(flows.address("tasks", id, "/events"))

    def _answer(self, path: Path, question: Document) -> Answer:
        try:
            return Answer(str(path), self.predict(path, **question), None)
        except (VouchsafeError, OSError) as error:
            return Answer(str(path), None, error)

    def _each(self, asked: Questions, at_once: int) -> Generator[Answer, None, None]:
        """The answers to one question a picture, each as it comes."""
        with ThreadPoolExecutor(at_once, "vouchsafe") as pool:
            waiting = [pool.submit(self._answer, path, asked.question) for path in asked.paths]
            try:
                for each in as_completed(waiting):
                    yield each.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, asked: Questions, manifest: str | Path) -> Generator[Answer, None, None]:
        """The answers of one batch, each as it comes; its manifest is written at the end."""
        batch = self._run(flows.batch(asked.files(), self._patience, asked.question))
        address, done = flows.address("batches", batch["id"]), 0
        try:
            for line in self._lines(f"{address}/results", self._patience.seconds):
                done += 1
                yield asked.answer(line)
        except GeneratorExit:
            self._run(flows.delete(address))
            raise
        if done < batch["total"]:
            raise Unreachable(f"the results of batch {batch['id']} ended early")
        signed = self._run(flows.get(f"{address}/manifest", self._patience))
        Path(manifest).write_text(json.dumps(signed), encoding="utf-8")

    def _events(self, path: str) -> Iterator[Event]:
        parser = EventParser()
        for line in self._lines(path):
            if (event := parser.feed(line)) is not None:
                yield event

    def _lines(self, path: str, silence: float = EVENTS_SECONDS) -> Iterator[str]:
        """The lines of a response as they come, with at most `silence` seconds between them."""
        timeout = httpx.Timeout(GRACE_SECONDS, read=silence)
        try:
            with self._http.stream("GET", path, timeout=timeout) as response:
                if not response.is_success:
                    response.read()
                    raise flows.failure(response)
                yield from response.iter_lines()
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _run(self, flow: Flow[T]) -> T:
        """The flow's result; its calls are sent, and their errors thrown into it."""
        response: httpx.Response | None = None
        error: VouchsafeError | None = None
        while True:
            try:
                step = flow.send(response) if error is None else flow.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            response, error = None, None
            if isinstance(step, Call):
                try:
                    response = self._send(step)
                except VouchsafeError as refused:
                    error = refused
            else:
                time.sleep(step.seconds)

    def _send(self, call: Call) -> httpx.Response:
        timeout = call.wait + GRACE_SECONDS
        try:
            response = self._http.request(call.method, call.path, timeout=timeout, **call.request)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise flows.failure(response)
        return response

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        return Unreachable(f"{self._http.base_url}: {str(error) or type(error).__name__}")
