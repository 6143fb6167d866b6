"""ASGI middleware for HTTP semantics: HEAD requests, and `Connection: close`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_SECONDS = 5.0
"""Seconds to discard the rest of a rejected body, so that its caller gets the response."""


class _HeadersSent(Exception):
    """Ends a HEAD request once its headers are sent; the body is not computed."""


class HeadRequests:
    """Answers HEAD with the status and headers of GET.

    An event stream sends its headers first, so HEAD never opens a stream.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; the app receives HEAD as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            await send(message)
            await send({"type": "http.response.body"})
            raise _HeadersSent

        get_scope = {**scope, "method": "GET"}
        try:
            await self._app(get_scope, receive, send_headers)
        except* _HeadersSent:
            pass
        finally:
            scope["route"] = get_scope.get("route")


class ConnectionClose:
    """Adds `Connection: close` to each response after which the connection is closed.

    These are responses that begin before the whole body has been read, and all responses while
    `is_stopping`. Before the close, the rest of the body is discarded for at most
    `linger_seconds`. Closing while bytes arrive would reset the connection, and the caller could
    lose the response.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_stopping: Callable[[], bool],
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self._app, self._is_stopping = app, is_stopping
        self._linger_seconds = linger_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, then discard the rest of an unread body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unread, lingers, held_back = _has_body(scope), False, False

        async def receive_on() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def send_on(message: Message) -> None:
            nonlocal lingers, held_back
            if message["type"] == "http.response.start":
                lingers = unread
                if unread or self._is_stopping():
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif lingers and not message.get("more_body"):
                held_back = True
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, receive_on, send_on)
        if held_back:
            await self._discard(receive)
            await send({"type": "http.response.body"})

    async def _discard(self, receive: Receive) -> None:
        try:
            async with asyncio.timeout(self._linger_seconds):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            return


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
