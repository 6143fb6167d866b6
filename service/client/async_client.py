"""Asynchronous client of a running service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
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


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited; iterators are asynchronous."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, timeout: float = 3600.0
    ) -> None:
        self._patience = Patience(checked(url, timeout))
        try:
            self._http = httpx.AsyncClient(**options(url, key))
        except httpx.InvalidURL as error:
            raise ValueError(f"url = {url!r}: {error}") from error

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(
        self, image: bytes | str | Path, *, idempotency_key: str | None = None, **question: Any
    ) -> PredictResponse:
        """See `Client.predict`."""
        content = await asyncio.to_thread(flows.read, image)
        return await self._run(flows.predict(content, self._patience, idempotency_key, question))

    async def predict_many(
        self,
        images: str | Path | Iterable[str | Path],
        *,
        at_once: int = 8,
        family_alpha: float | None = None,
        manifest: str | Path | None = None,
        out: str | Path | None = None,
        on_answer: Callable[[Answer], None] | None = None,
        **question: Any,
    ) -> AsyncIterator[Answer]:
        """See `Client.predict_many`."""
        asked = Questions.of(images, family_alpha, question, manifest is not None)
        found = self._each(asked, at_once) if manifest is None else self._batch(asked, manifest)
        with saving(out) as save:
            async with aclosing(found) as answers:
                async for answer in answers:
                    save(answer)
                    if on_answer is not None:
                        on_answer(answer)
                    yield answer

    async def demonstrate(
        self,
        image: bytes | str | Path,
        kind: Literal["rows", "attack"] = "rows",
        *,
        idempotency_key: str | None = None,
        **question: Any,
    ) -> DemonstrationResponse:
        """See `Client.demonstrate`."""
        content, asked = await asyncio.to_thread(flows.read, image), {**question, "kind": kind}
        return await self._run(flows.demonstrate(content, self._patience, idempotency_key, asked))

    async def models(self) -> list[ModelResponse]:
        """See `Client.models`."""
        return await self._run(flows.models(self._patience))

    async def tasks(self) -> list[TaskResponse]:
        """See `Client.tasks`."""
        return await self._run(flows.tasks(self._patience))

    async def task(self, id: str) -> TaskResponse:
        """See `Client.task`."""
        return await self._run(flows.task(id, self._patience))

    async def make_task(self, labels: Sequence[Any], **settings: Any) -> TaskResponse:
        """See `Client.make_task`."""
        return await self._run(flows.make_task(labels, self._patience, settings))

    async def wait_for_task(
        self, id: str, on_progress: Callable[[Document], None] | None = None
    ) -> TaskResponse:
        """See `Client.wait_for_task`."""
        async for event in self.task_events(id):
            if (task := flows.ended_task(event)) is not None:
                return task
            if on_progress is not None:
                on_progress(event.data)
        raise Unreachable(f"the events of task {id} ended before it was ready")

    async def delete_task(self, id: str) -> None:
        """See `Client.delete_task`."""
        await self._run(flows.delete(flows.address("tasks", id)))

    async def job(self, id: str) -> JobResponse:
        """See `Client.job`."""
        return await self._run(flows.job(id, self._patience))

    async def delete_job(self, id: str) -> None:
        """See `Client.delete_job`."""
        await self._run(flows.delete(flows.address("jobs", id)))

    async def certificate(self, id: str) -> SignedCertificate:
        """See `Client.certificate`."""
        return await self._run(flows.certificate(id, self._patience))

    async def public_keys(self) -> Document:
        """See `Client.public_keys`."""
        return await self._run(flows.get("/.well-known/jwks.json", self._patience))

    async def verify(
        self,
        certificate: Certificate,
        jwks: str | Path | Mapping[str, Any] | None = None,
        *,
        image: bytes | str | Path | None = None,
    ) -> VerificationResponse:
        """See `Client.verify`."""
        keys = await self.public_keys() if jwks is None else jwks
        return await asyncio.to_thread(verified, certificate, keys, image)

    def job_events(self, id: str) -> AsyncIterator[Event]:
        """See `Client.job_events`."""
        return self._events(flows.address("jobs", id, "/events"))

    def task_events(self, id: str) -> AsyncIterator[Event]:
        """See `Client.task_events`."""
        return self._events(flows.address("tasks", id, "/events"))

    async def _answer(self, path: Path, question: Document) -> Answer:
        try:
            return Answer(str(path), await self.predict(path, **question), None)
        except (VouchsafeError, OSError) as error:
            return Answer(str(path), None, error)

    async def _each(self, asked: Questions, at_once: int) -> AsyncGenerator[Answer, None]:
        room = asyncio.Semaphore(at_once)

        async def answer_of(path: Path) -> Answer:
            async with room:
                return await self._answer(path, asked.question)

        waiting = [asyncio.ensure_future(answer_of(path)) for path in asked.paths]
        try:
            for each in asyncio.as_completed(waiting):
                yield await each
        finally:
            for task in waiting:
                task.cancel()

    async def _batch(self, asked: Questions, manifest: str | Path) -> AsyncGenerator[Answer, None]:
        """See `Client._batch`."""
        files = await asyncio.to_thread(asked.files)
        batch = await self._run(flows.batch(files, self._patience, asked.question))
        address, done = flows.address("batches", batch["id"]), 0
        try:
            async with aclosing(self._lines(f"{address}/results", self._patience.seconds)) as lines:
                async for line in lines:
                    done += 1
                    yield asked.answer(line)
        except GeneratorExit:
            await self._run(flows.delete(address))
            raise
        if done < batch["total"]:
            raise Unreachable(f"the results of batch {batch['id']} ended early")
        signed = await self._run(flows.get(f"{address}/manifest", self._patience))
        await asyncio.to_thread(Path(manifest).write_text, json.dumps(signed), encoding="utf-8")

    async def _events(self, path: str) -> AsyncIterator[Event]:
        parser = EventParser()
        async with aclosing(self._lines(path)) as lines:
            async for line in lines:
                if (event := parser.feed(line)) is not None:
                    yield event

    async def _lines(self, path: str, silence: float = EVENTS_SECONDS) -> AsyncGenerator[str, None]:
        """See `Client._lines`."""
        timeout = httpx.Timeout(GRACE_SECONDS, read=silence)
        try:
            async with self._http.stream("GET", path, timeout=timeout) as response:
                if not response.is_success:
                    await response.aread()
                    raise flows.failure(response)
                async for line in response.aiter_lines():
                    yield line
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    async def _run(self, flow: Flow[T]) -> T:
        """See `Client._run`."""
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
                    response = await self._send(step)
                except VouchsafeError as refused:
                    error = refused
            else:
                await asyncio.sleep(step.seconds)

    async def _send(self, call: Call) -> httpx.Response:
        timeout = call.wait + GRACE_SECONDS
        try:
            response = await self._http.request(
                call.method, call.path, timeout=timeout, **call.request
            )
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise flows.failure(response)
        return response

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        return Unreachable(f"{self._http.base_url}: {str(error) or type(error).__name__}")
