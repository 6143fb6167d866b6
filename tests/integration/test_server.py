"""service/operations/server.py: addresses are taken before anything is served on them."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from service.operations.server import DrainingServer, SideServer

Server = DrainingServer | SideServer
MAKERS: dict[str, Callable[[str, int], Server]] = {
    "draining": DrainingServer,
    "beside": lambda host, port: SideServer(FastAPI(), host, port),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[str, int], Server]]:
    """Makes a server of either kind; all are closed at the end."""
    made: list[Server] = []

    def make(host: str, port: int) -> Server:
        made.append(MAKERS[request.param](host, port))
        return made[-1]

    yield make
    for server in made:
        server.close()


def test_a_port_in_use_is_named(make: Callable[[str, int], Server]) -> None:
    """A second server on a port ends as it is made: the error has host, port and reason."""
    port = make("127.0.0.1", 0).port
    with pytest.raises(OSError, match=r"^cannot listen on ") as refused:
        make("127.0.0.1", port)
    assert str(refused.value) == f"cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_an_unknown_host_is_named(make: Callable[[str, int], Server]) -> None:
    """A host without an address is refused in the same words."""
    with pytest.raises(OSError, match=r"^cannot listen on no\.such\.invalid port 80: \w+"):
        make("no.such.invalid", 80)


def test_a_host_is_served_at_all_its_addresses(
    make: Callable[[str, int], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both addresses of a name are listened on, at one port, however often they are listed."""
    addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    port = make("both", 0).port
    monkeypatch.undo()
    for address in addresses:
        socket.create_connection((address, port), timeout=5).close()


def test_one_address_in_use_lets_go_of_the_others(
    make: Callable[[str, int], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that cannot have all addresses of its host keeps none."""
    port = make("127.0.0.2", 0).port
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
        for each in ("127.0.0.1", "127.0.0.2")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(OSError, match="cannot listen on both"):
        make("both", port)
    monkeypatch.undo()
    assert make("127.0.0.1", port).port == port


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:{}"), ("::1", "http://[::1]:{}")]
)
def test_the_url_has_the_port_it_got(host: str, url: str) -> None:
    """Port 0 takes a free one, which the address tells; one of IPv6 stands in brackets."""
    try:
        server = DrainingServer(host, 0)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    assert server.port > 0
    assert server.url == url.format(server.port)
    server.close()


async def test_it_serves_on_the_socket_it_bound_and_closes_it() -> None:
    """Calls are answered at the port that was taken first, and it is free afterwards."""
    app = FastAPI()
    app.get("/")(lambda: "here")
    server = SideServer(app, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.port}"
    async with server.serving(), httpx.AsyncClient() as client:
        assert (await client.get(url, timeout=30)).json() == "here"
    SideServer(app, "127.0.0.1", server_port(url)).close()


@pytest.fixture
def _signals() -> Iterator[None]:
    """The handlers of SIGTERM and SIGINT are afterwards what they were."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.usefixtures("_signals")
def test_what_runs_beside_begins_once_it_listens_and_ends_with_it() -> None:
    """The coroutine is started when calls are answered, and cancelled as the server stops."""
    server = DrainingServer("127.0.0.1", 0)
    seen: list[bool] = []

    async def beside() -> None:
        seen.append(server.started)
        server.stop()
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(server.should_exit)

    app = FastAPI()
    predictions = SimpleNamespace(drain=lambda _: None)
    app.state.services = SimpleNamespace(predictions=predictions)
    server.serve_app(app, beside)
    assert seen == [True, True]


def server_port(url: str) -> int:
    return int(url.rpartition(":")[2])
