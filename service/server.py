"""Uvicorn, made to drain: waiting callers are answered, and a clean stop exits with 0."""

from __future__ import annotations

import signal
import socket

import uvicorn
from fastapi import FastAPI

DRAIN_SECONDS = 5.0
"""How long callers who wait for an answer may go on waiting once the service is told to stop."""


class DrainingServer(uvicorn.Server):
    """Serves one app on one address until SIGTERM or SIGINT, then drains and returns."""

    def __init__(self, host: str, port: int) -> None:
        config = uvicorn.Config(
            "", host=host, port=port, access_log=False, timeout_graceful_shutdown=10
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
