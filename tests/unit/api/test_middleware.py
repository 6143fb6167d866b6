"""service/api/middleware.py: open requests, event streams and bodies are bounded."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from service.api.middleware import Allowance, RequestBounds
from service.config import Settings
from service.errors import BodyTimeout, Overloaded, TooManyOpen
from tests.support.fakes import FakeClock
from tests.support.metrics import counted
from tests.support.serving import PNG, Service, problem, serving

CERTIFY_ROWS = 1_100
JSON = {"Content-Type": "application/json"}
PROBES = ("/livez", "/readyz", "/startupz", "/metrics")


class Upload:
    """A body of `parts` whose last part is held back until `rest` is set."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = parts
        self.arrived = asyncio.Event()
        self.rest = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        self.arrived.set()
        await self.rest.wait()
        yield b"}"


def uploading(
    service: Service, upload: Upload, key: str | None = None
) -> asyncio.Task[httpx.Response]:
    headers = JSON if key is None else {**JSON, "Authorization": f"Bearer {key}"}
    sending = service.client.post("/predict", content=upload, headers=headers)
    return asyncio.create_task(sending)


async def ended(uploads: Iterable[Upload], sending: Iterable[asyncio.Task[Any]]) -> None:
    for upload in uploads:
        upload.rest.set()
    await asyncio.gather(*sending)


async def backlog_is(service: Service, rows: int) -> None:
    async with asyncio.timeout(60):
        while (await service.engine.capacity()).backlog_rows != rows:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def probes_answer(service: Service) -> None:
    for probe in PROBES:
        assert (await service.client.get(probe)).status_code == 200


async def test_bodies_that_have_not_arrived_are_bounded_together() -> None:
    """The body that would pass the bound over all is a 503, counted and with Retry-After, while
    probes answer; once a body has gone there is room again."""
    settings = {"max_image_bytes": 30_000, "max_body_bytes_in_flight": 250_000}
    async with serving(**settings) as service:
        uploads = [Upload(b"{" + b" " * 99_999) for _ in range(2)]
        sending = [uploading(service, upload) for upload in uploads]
        for upload in uploads:
            await upload.arrived.wait()
        before = counted("vouchsafe_rejections_total", reason="overloaded")
        refused = await uploading(service, Upload(b" " * 99_999))
        document = problem(refused, 503, "overloaded")
        assert "250000 bytes of request bodies" in document["detail"]
        assert "VOUCHSAFE_MAX_BODY_BYTES_IN_FLIGHT" in document["detail"]
        assert document["limit"] == 250_000
        assert int(refused.headers["retry-after"]) >= 1
        assert counted("vouchsafe_rejections_total", reason="overloaded") == before + 1
        await probes_answer(service)
        await ended(uploads[:1], sending[:1])
        assert (await service.ask()).status_code == 200
        await ended(uploads, sending)
        assert {each.result().status_code for each in sending} == {422}


async def test_a_caller_who_waits_holds_no_body() -> None:
    """Once the image is queued its bytes are not counted: waiting callers leave room to ask."""
    body = json.dumps({"image": b64encode(PNG).decode()}).encode() + b" " * 60_000
    async with serving(max_image_bytes=1_000, max_body_bytes_in_flight=134_000) as service:
        service.voter.open.clear()
        asked = []
        for number in (1, 2, 3):
            asking = service.client.post("/predict", content=body, headers=JSON)
            asked.append(asyncio.create_task(asking))
            await backlog_is(service, number * CERTIFY_ROWS)
        service.voter.open.set()
        assert {response.status_code for response in await asyncio.gather(*asked)} == {200}


async def test_one_key_holds_half_of_the_bodies_at_most() -> None:
    """A key with half of the bytes in its name is a 429, while another key is let in."""
    keys = {"api_keys": "ann:key-of-ann,bob:key-of-bob"}
    bounds = {"max_image_bytes": 30_000, "max_body_bytes_in_flight": 250_000}
    async with serving(**keys, **bounds) as service:
        upload = Upload(b"{" + b" " * 99_999)
        sending = uploading(service, upload, "key-of-ann")
        await upload.arrived.wait()
        refused = await uploading(service, Upload(b" " * 99_999), "key-of-ann")
        assert problem(refused, 429, "too-many-open")["limit"] == 125_000
        assert int(refused.headers["retry-after"]) >= 1
        other = Upload(b"{" + b" " * 99_999)
        other.rest.set()
        problem(await uploading(service, other, "key-of-bob"), 422, "invalid-field")
        await ended([upload], [sending])


async def test_callers_who_wait_are_bounded() -> None:
    """A request past the bound is a 503 under its own route, while probes answer; once one has
    been answered there is room again."""
    async with serving(max_open_requests=2) as service:
        service.voter.open.clear()
        asked = [asyncio.create_task(service.ask(n=str(n))) for n in (100, 110)]
        await service.voter.busy.wait()
        await backlog_is(service, 410)
        labels = {"method": "POST", "route": "/predict", "status": "503"}
        before = counted("vouchsafe_http_requests_total", **labels)
        refused = await service.ask()
        assert "2 open requests at once" in problem(refused, 503, "overloaded")["detail"]
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["x-request-id"]
        assert counted("vouchsafe_http_requests_total", **labels) == before + 1
        problem(await service.client.get("/models"), 503, "overloaded")
        await probes_answer(service)
        service.voter.open.set()
        assert {response.status_code for response in await asyncio.gather(*asked)} == {200}
        assert (await service.client.get("/models")).status_code == 200


async def test_event_streams_are_bounded_apart() -> None:
    """A stream past the bound is a 503, while questions are answered; an ended stream leaves
    room."""
    async with serving(max_event_streams=2) as service:
        service.voter.open.clear()
        job = await service.ask(headers={"Prefer": "respond-async"})
        events = f"{job.headers['location']}/events"
        streams = [asyncio.create_task(service.client.get(events)) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await service.client.get(events)
        document = problem(refused, 503, "overloaded")
        assert "2 open event streams at once" in document["detail"]
        assert (await service.client.get("/models")).status_code == 200
        service.voter.open.set()
        assert {response.status_code for response in await asyncio.gather(*streams)} == {200}
        assert (await service.client.get(events)).status_code == 200


def test_an_allowance_is_what_was_not_given_back() -> None:
    """All callers share the limit, one key has half of it, and what is given back is free."""
    allowance = Allowance("things", "SETTING", 4)
    allowance.take("ann", 2)
    with pytest.raises(TooManyOpen, match="may have 2 things at once"):
        allowance.take("ann")
    allowance.take("bob")
    allowance.take(None)
    with pytest.raises(Overloaded, match=r"takes 4 things at once \(SETTING\)"):
        allowance.take(None)
    allowance.give_back("ann", 2)
    allowance.take(None, 2)
    allowance.give_back(None, 3)
    allowance.give_back("bob")
    allowance.take("ann", 2)


class Connection:
    """An upload that sends a byte every 10 s by its told clock, or nothing at all."""

    def __init__(self, *, silent: bool = False) -> None:
        self.clock = FakeClock()
        self._silent = silent

    async def receive(self) -> Message:
        if self._silent:
            await asyncio.Event().wait()
        self.clock.advance(10)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(self, message: Message) -> None:
        pass

    async def served_by(self, app: Any, **settings: Any) -> None:
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        bounds = RequestBounds(app, Settings(**settings), self.clock)
        async with asyncio.timeout(60):
            await bounds(scope, self.receive, self.send)


async def test_a_body_has_a_time_limit_however_it_trickles() -> None:
    """The limit is for the whole body: a byte every 10 s does not renew it."""
    connection, parts = Connection(), 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal parts
        while True:
            await receive()
            parts += 1

    with pytest.raises(BodyTimeout, match=r"in 45 s \(VOUCHSAFE_BODY_SECONDS\)"):
        await connection.served_by(app, body_seconds=45)
    assert parts == 4


async def test_a_slow_body_after_the_answer_is_a_caller_who_left() -> None:
    """Once the response has begun no problem can be told: the connection counts as closed."""
    told: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not told or told[-1] == "http.request":
            told.append((await receive())["type"])

    await Connection().served_by(app, body_seconds=15)
    assert told == ["http.request", "http.disconnect"]


async def test_a_body_that_stops_is_a_problem_that_closes_the_connection() -> None:
    """A body of which nothing more comes is a 503 that says that the connection ends."""
    async with serving(body_seconds=0.2) as service:
        upload = Upload(b"{")
        refused = await uploading(service, upload)
        document = problem(refused, 503, "body-timeout")
    assert document["limit"] == 0.2
    assert refused.headers["connection"] == "close"


async def test_waiting_for_an_answer_is_not_waiting_for_a_body() -> None:
    """A caller whose body is whole may wait for longer than a body may take."""
    async with serving(body_seconds=0.2) as service:
        service.voter.open.clear()
        asking = asyncio.create_task(service.ask())
        await service.voter.busy.wait()
        await asyncio.wait({asking}, timeout=0.5)
        assert not asking.done()
        service.voter.open.set()
        assert (await asking).status_code == 200
