"""The app with its fake voter on a port of this machine, for browsers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import uvicorn

from tests.support.serving import Service


class Listening:
    """A service that runs in a thread of its own; `url` is its address."""

    def __init__(self, service: Service, port: int) -> None:
        self.service, self.url = service, f"http://127.0.0.1:{port}"
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        """Serve until the server should exit."""
        self._loop = asyncio.get_running_loop()
        await server.serve([listener])

    def go_on(self) -> None:
        """Have the voter vote, from another thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.service.voter.open.set)


@contextmanager
def listening(service: Service) -> Iterator[Listening]:
    """The service on a free port, until the end of the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    found = Listening(service, listener.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(service.app, log_level="warning", log_config=None))
    thread = Thread(target=lambda: asyncio.run(found.serve(server, listener)))
    thread.start()
    try:
        yield found
    finally:
        found.go_on()
        server.should_exit = True
        thread.join()
