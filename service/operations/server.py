"""Uvicorn servers: one that drains and exits with 0, and one beside a process's own work."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.operations.http_semantics import ConnectionClose

DRAIN_SECONDS = 5.0
"""Seconds that waiting callers have for their answers once the service is stopping."""


class _BoundServer(uvicorn.Server):
    """Listens from its construction on, before it has an app, and sends `Connection: close`.

    Raises OSError with the address if it cannot listen.
    """

    def __init__(self, config: uvicorn.Config, host: str, port: int) -> None:
        super().__init__(config)
        self._sockets = _listening(host, port)

    @property
    def port(self) -> int:
        """The port on which the server listens, also if the requested port was 0."""
        return int(self._sockets[0].getsockname()[1])

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on the sockets of the constructor."""
        try:
            await super().serve(sockets or self._sockets)
        finally:
            self.close()

    def close(self) -> None:
        """Close the sockets, whether or not the server has served."""
        for each in self._sockets:
            each.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as Uvicorn does, with ConnectionClose around the loaded app."""
        app = self.config.loaded_app
        self.config.loaded_app = ConnectionClose(app, lambda: self.should_exit)
        await super().startup(sockets)


class DrainingServer(_BoundServer):
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
        super().__init__(config, host, port)
        self._once_listening: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._beside: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The address that callers use on this machine."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104
        host = anywhere.get(self.config.host, self.config.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def serve_app(
        self, app: FastAPI, once_listening: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> None:
        """Serve until a signal or `stop`; `once_listening` runs once the server listens.

        Uvicorn raises its signal again after draining. The handlers set here only stop the server,
        so that the process exits with 0.
        """
        self.config.app = app
        self._once_listening = once_listening
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, lambda *_: self.stop())
        self.run()

    def stop(self) -> None:
        """Drain and return."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as Uvicorn does, then run `once_listening`."""
        await super().startup(sockets)
        if self.started and self._once_listening is not None:
            self._beside = asyncio.create_task(self._once_listening())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as Uvicorn does, after draining the app's waiting callers."""
        if self._beside is not None:
            self._beside.cancel()
        app = self.config.app
        if isinstance(app, FastAPI):
            app.state.services.predictions.drain(DRAIN_SECONDS)
        await super().shutdown(sockets)


class SideServer(_BoundServer):
    """Serves an app while a process works; signals stay with the process."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
        super().__init__(config, host, port)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals."""
        yield

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve during the context."""
        running = asyncio.create_task(self.serve())
        try:
            yield
        finally:
            self.should_exit = True
            await running


def _listening(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of the host; raises OSError with host and port."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((each[0], each[4][0]) for each in found):
            port = sockets[0].getsockname()[1] if sockets else port
            sockets.append(socket.create_server((str(address), port), family=family))
    except (OSError, UnicodeError) as error:
        for each in sockets:
            each.close()
        if isinstance(error, UnicodeError):
            reason = "no host can have that name"
        elif isinstance(error, socket.gaierror):  # Its errno is not the system's.
            reason = error.strerror or "unknown host"
        else:
            reason = os.strerror(error.errno or 0)
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error
    return sockets
