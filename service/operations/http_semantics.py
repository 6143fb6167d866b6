"""ASGI middleware for two rules of HTTP: HEAD is GET without a body, and a close is announced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_SECONDS = 5.0
"""How long the rest of a refused body is read and discarded, so that its caller sees the answer."""


class _Answered(Exception):
    """The headers of an answer to HEAD are sent; its body is not computed."""


class HeadRequests:
    """Answers HEAD with the status and headers that GET would get, and ends there.

    An event stream sends its headers first, so HEAD never opens one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; of a HEAD request the app sees a GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            await send(message)
            await send({"type": "http.response.body"})
            raise _Answered

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, receive, send_headers)
        except* _Answered:
            pass
        finally:
            scope["route"] = asked.get("route")


class ConnectionClose:
    """Adds `Connection: close` to each answer after which the connection does not stay open.

    These are answers that begin before the request's body was read to its end, and all answers
    where `is_stopping` says so. The rest of the body is discarded for `linger_seconds` at most
    before the connection ends: closing on bytes that are still arriving would reset it, and the
    caller could lose the answer.
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
        """Serve a request, then read what is left of a body that nobody wanted."""
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
