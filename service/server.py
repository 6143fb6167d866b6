"""Uvicorn, made to drain: waiting callers are answered, and a clean stop exits with 0; and made to
serve beside a process's own work."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from service.http_semantics import ConnectionClose

DRAIN_SECONDS = 5.0
"""How long callers who wait for an answer may go on waiting once the service is told to stop."""


class _AnnouncingServer(uvicorn.Server):
    """Says `Connection: close` in each answer after which it closes the connection."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's own, with the app that the configuration has loaded wrapped."""
        app = self.config.loaded_app
        self.config.loaded_app = ConnectionClose(app, lambda: self.should_exit)
        await super().startup(sockets)


class DrainingServer(_AnnouncingServer):
    """Serves one app on one address until SIGTERM or SIGINT, then drains and returns."""

    def __init__(self, host: str, port: int) -> None:
        config = uvicorn.Config(
            "",
            host=host,
            port=port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=10,
        )
        super().__init__(config)

    def serve_app(self, app: FastAPI) -> None:
        """Serve until told to stop.

        Uvicorn raises a signal again once it has drained; by then the process has ended well, so
        both signals do no more than ask it to stop.
        """
        self.config.app = app
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, lambda *_: self.stop())
        self.run()

    def stop(self) -> None:
        """Drain and return."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's own, after telling the app to let go of waiting callers."""
        app = self.config.app
        if isinstance(app, FastAPI):
            app.state.predictions.drain(DRAIN_SECONDS)
        await super().shutdown(sockets)


class SideServer(_AnnouncingServer):
    """Serves an app for as long as a process works, and leaves the signals to it."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                timeout_graceful_shutdown=2,
            )
        )
        self._socket = _listening(host, port)

    @property
    def port(self) -> int:
        """The port it listens on, whichever was asked for."""
        return int(self._socket.getsockname()[1])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve within the context."""
        running = asyncio.create_task(self.serve([self._socket]))
        try:
            yield
        finally:
            self.should_exit = True
            await running


def _listening(host: str, port: int) -> socket.socket:
    """A socket bound to the address; raises OSError that names it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error
