from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import socket
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from benchmarks.server import free_port
from service.operations.http_semantics import ConnectionClose
from service.operations.server import DrainingServer, SideServer
from tests.support.serving import DIGEST, PNG, Service, serving

KEY = {"Authorization": "Bearer key-of-ann"}


async def test_head_is_get_without_a_body(service: Service) -> None:
    """Every address that GET has answers HEAD with GET's status and headers, and no body."""
    accepted = await service.ask(headers={"Prefer": "respond-async"}, mode="predict")
    job = accepted.json()["id"]
    described = (await service.client.get("/openapi.json")).json()["paths"]
    assert not any("head" in operations for operations in described.values())
    names = {"id": job, "file": "0-0.png", "task": "default", "version": DIGEST}
    paths = [path.format(**names) for path in described if "get" in described[path]]
    assets = ["/docs/assets/swagger-ui.css", "/docs/assets/nothing"]
    for path in [*paths, *assets, "/", "/docs", "/openapi.json", "/nowhere"]:
        head, get = await service.client.head(path), await service.client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        for response in (head, get):
            del response.headers["x-request-id"]
        if path == "/metrics":  # Its length changes with each request.
            del head.headers["content-length"], get.headers["content-length"]
        assert head.headers == get.headers, path


async def test_head_opens_no_event_stream(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD of an unfinished job's events answers at once with the stream's headers alone."""
    service.voter.open.clear()
    accepted = await service.ask(headers={"Prefer": "respond-async"})
    monkeypatch.delattr(type(service.engine), "watch")
    response = await service.client.head(f"{accepted.headers['location']}/events")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")


async def test_head_of_an_unforeseen_error_is_its_status(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that fails answers HEAD as it answers GET."""
    monkeypatch.delattr(type(service.engine), "status")
    assert (await service.client.head("/jobs/x")).status_code == 500


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/jobs/x", "DELETE, GET, HEAD"),
        ("PUT", "/tasks", "GET, HEAD, POST"),
        ("PATCH", "/tasks/x", "DELETE, GET, HEAD"),
        ("POST", "/livez", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("POST", "/docs/assets/swagger-ui.css", "GET, HEAD"),
        ("GET", "/predict", "POST"),
        ("HEAD", "/predict", "POST"),
    ],
)
async def test_allow_names_every_method_of_an_address(
    service: Service, method: str, path: str, allowed: str
) -> None:
    """A 405 lists the methods of all routes at the address, HEAD with each GET."""
    response = await service.client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


@asynccontextmanager
async def connected(service: Service) -> AsyncIterator[Connection]:
    """A connection to a real server of the app."""
    side = SideServer(service.app, "127.0.0.1", 0)
    async with side.serving():
        connection = await Connection.open(side.port)
        yield connection
        await connection.close()


class Connection:
    """One TCP connection, on which requests are written by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to a port of this machine."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, request_line: str, headers: dict[str, Any], body: bytes = b"") -> None:
        """Write a request's head, and as much of its body as is given."""
        named = {"Host": "localhost", **headers}
        lines = [f"{request_line} HTTP/1.1", *(f"{name}: {named[name]}" for name in named)]
        await self.send_more("\r\n".join([*lines, "", ""]).encode() + body)

    async def send_more(self, body: bytes) -> None:
        """Write more of a body."""
        self._writer.write(body)
        await self._writer.drain()

    async def answer(self) -> tuple[int, dict[str, str]]:
        """The status and the headers of the next answer, whose body is read too."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        headers = dict(line.split(": ", 1) for line in head[1:-1])
        await self._reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers

    async def ended(self) -> bool:
        """Whether the server closes the connection, and has sent nothing more."""
        return await self._reader.read() == b""

    async def close(self) -> None:
        """Leave."""
        self._writer.close()
        await self._writer.wait_closed()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/predict", {"Content-Type": "application/json"}, 401),
        ("/nowhere", KEY, 404),
        ("/livez", {}, 405),
        ("/predict", {**KEY, "Content-Type": "text/plain"}, 415),
        ("/predict", {**KEY, "Content-Type": "multipart/form-data"}, 400),
    ],
)
@pytest.mark.parametrize("framing", [{"Content-Length": 1000}, {"Transfer-Encoding": "chunked"}])
async def test_a_refusal_before_the_body_says_that_the_connection_ends(
    path: str, headers: dict[str, str], status: int, framing: dict[str, Any]
) -> None:
    """An answer to an unfinished body carries `Connection: close`; the body's end closes it."""
    chunked = "Transfer-Encoding" in framing
    async with serving(api_keys="ann:key-of-ann") as service, connected(service) as connection:
        await connection.send(f"POST {path}", {**headers, **framing})
        answered, told = await connection.answer()
        assert (answered, told["connection"]) == (status, "close")
        await connection.send_more(
            b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n" if chunked else b"x" * 1000
        )
        assert await connection.ended()


async def test_a_caller_that_is_not_told_to_continue_is_told_of_the_end(service: Service) -> None:
    """A refusal in place of `100 Continue` says that the server will not read on."""
    async with connected(service) as connection:
        expecting = {"Content-Type": "text/plain", "Content-Length": 9, "Expect": "100-continue"}
        await connection.send("POST /predict", expecting)
        assert (await connection.answer())[1]["connection"] == "close"


async def test_a_refused_upload_is_read_on_so_that_the_answer_arrives() -> None:
    """A caller who sends all of a body before reading gets the refusal, not a reset connection."""
    async with serving(max_image_bytes=65_536) as service, connected(service) as connection:
        body = b"x" * 2**24
        headers = {"Content-Type": "application/json", "Content-Length": len(body)}
        await connection.send("POST /predict", headers, body)
        status, told = await connection.answer()
        assert (status, told["connection"]) == (413, "close")
        assert await connection.ended()


async def test_a_body_that_was_read_keeps_the_connection(service: Service) -> None:
    """Answers to whole requests, refusals too, leave the connection open and do not deny it."""
    async with connected(service) as connection:
        for body, status in ((b"[]", 422), (b"{", 400)):
            headers = {"Content-Type": "application/json", "Content-Length": len(body)}
            await connection.send("POST /predict", headers, body)
            answered, told = await connection.answer()
            assert (answered, "connection" in told) == (status, False)
        await connection.send("GET /livez", {})
        answered, told = await connection.answer()
        assert (answered, "connection" in told) == (200, False)


async def test_an_unforeseen_error_says_that_the_connection_ends(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server closes the connection after an error that it did not foresee, and says so."""
    monkeypatch.delattr(type(service.engine), "status")
    async with connected(service) as connection:
        await connection.send("GET /jobs/x", {})
        status, told = await connection.answer()
        assert (status, told["connection"]) == (500, "close")
        assert await connection.ended()


class Watched(DrainingServer):
    """Says when it listens."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def test_a_draining_server_says_that_the_connection_ends() -> None:
    """A caller who waits while the server drains gets an answer with `Connection: close`."""
    service = Service()
    service.voter.open.clear()
    server = Watched("127.0.0.1", port := free_port())
    server.config.app = service.app
    running = asyncio.create_task(server.serve())
    await server.listening.wait()
    connection = await Connection.open(port)
    parts = [b"--b", b'Content-Disposition: form-data; name="image"; filename="i"', b"", PNG]
    body = b"\r\n".join([*parts, b"--b--", b""])
    kind = "multipart/form-data; boundary=b"
    headers = {"Content-Type": kind, "Content-Length": len(body)}
    await service.until("/readyz", lambda found: found.status_code == 200)
    await connection.send("POST /predict", headers, body)
    await service.voter.busy.wait()
    server.stop()
    service.voter.open.set()
    status, told = await connection.answer()
    assert (status, told["connection"]) == (200, "close")
    assert await connection.ended()
    await connection.close()
    await running
    await service.client.aclose()


async def test_a_body_that_never_ends_is_not_waited_for() -> None:
    """The rest of a refused body is read for the time that was set, then the answer ends."""
    sent: list[Message] = []

    async def silent() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    async def refuses(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    scope = {"type": "http", "headers": [(b"content-length", b"9")]}
    app = ConnectionClose(refuses, lambda: False, linger_seconds=0.0)
    await app(scope, silent, send)
    assert [(part.get("body"), part.get("more_body")) for part in sent[1:]] == [
        (b"no", True),
        (None, None),
    ]
    assert sent[0]["headers"] == [(b"connection", b"close")]
