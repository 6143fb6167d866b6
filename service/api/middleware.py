"""ASGI middleware that bounds what callers hold open, and checks hosts and origins.

Probes and /metrics pass it untouched: a full service can still be watched.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Collection
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.auth import owner_of
from service.api.problems import render_problem
from service.config import Settings
from service.engine.protocol import RETRY_SECONDS
from service.errors import (
    BodyTimeout,
    HostRefused,
    OriginRefused,
    Overloaded,
    Problem,
    TooManyOpen,
    as_json,
)

_WATCHED = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]*)?")
_CORS_METHODS = ("GET", "HEAD", "POST", "DELETE")
_CORS_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "Prefer",
    "traceparent",
    "X-Request-Id",
)
_CORS_EXPOSED = ("Location", "Preference-Applied", "Retry-After", "X-Request-Id")


def add_bounds(app: FastAPI, settings: Settings) -> None:
    """Mount the bounds, and the checks of hosts and origins that the settings ask for."""
    app.add_middleware(RequestBounds, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=_CORS_METHODS,
            allow_headers=_CORS_HEADERS,
            expose_headers=_CORS_EXPOSED,
        )
    if settings.allowed_hosts or not settings.callers():
        app.add_middleware(HostCheck, hosts=settings.allowed_hosts, origins=settings.cors_origins)


def admitted(request: Request) -> None:
    """Raises what RequestBounds refused the request with: here its route is known to metrics."""
    refusal: Problem | None = getattr(request.state, "refusal", None)
    if refusal is not None:
        raise refusal


class Allowance:
    """An amount of something that all callers share; one key may hold half of it."""

    def __init__(self, what: str, setting: str, limit: int) -> None:
        self._what, self._setting, self._limit = what, setting, limit
        self._held = 0
        self._held_by: Counter[str] = Counter()

    def take(self, owner: str | None, amount: int = 1) -> None:
        """Hold `amount` more for a key's owner, or for a caller without a key.

        Raises TooManyOpen where the owner would hold more than half, and Overloaded where all
        callers would hold more than the limit.
        """
        half = self._limit // 2
        if owner is not None and self._held_by[owner] + amount > half:
            detail = f"This key may have {half} {self._what} at once; end some, or ask again later"
            raise TooManyOpen(detail, retry_after=RETRY_SECONDS, limit=half)
        if self._held + amount > self._limit:
            detail = (
                f"The service takes {self._limit} {self._what} at once ({self._setting}); "
                "ask again later"
            )
            raise Overloaded(detail, retry_after=RETRY_SECONDS, limit=self._limit)
        self._held += amount
        if owner is not None:
            self._held_by[owner] += amount

    def give_back(self, owner: str | None, amount: int = 1) -> None:
        """Hold `amount` less."""
        self._held -= amount
        if owner is not None:
            self._held_by[owner] -= amount
            if not self._held_by[owner]:
                del self._held_by[owner]


class Body:
    """A request's body as it arrives: its bytes are held in an allowance, its time is limited."""

    def __init__(
        self,
        receive: Receive,
        allowance: Allowance,
        owner: str | None,
        seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._receive, self._allowance, self._owner = receive, allowance, owner
        self._seconds, self._clock = seconds, clock
        self._deadline = clock() + seconds
        self._held = 0
        self._whole = False
        self.is_answered = False
        """Whether the response has begun, so that no problem can be reported any more."""

    async def receive(self) -> Message:
        """The connection's next message; raises BodyTimeout, TooManyOpen and Overloaded.

        Once the response has begun, a body that takes too long counts as a disconnected caller.
        """
        if self._whole:
            return await self._receive()
        try:
            return await self._next_part()
        except Problem:
            if self.is_answered:
                return {"type": "http.disconnect"}
            raise

    def release(self) -> None:
        """Count the body's bytes no longer: nothing holds them any more."""
        self._allowance.give_back(self._owner, self._held)
        self._held = 0

    async def _next_part(self) -> Message:
        try:
            async with asyncio.timeout(max(0.0, self._deadline - self._clock())):
                message = await self._receive()
        except TimeoutError as error:
            raise self._too_slow() from error
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._allowance.take(self._owner, size)
            self._held += size
            self._whole = not message.get("more_body", False)
            if not self._whole and self._clock() > self._deadline:
                raise self._too_slow()
        return message

    def _too_slow(self) -> BodyTimeout:
        detail = f"The body has not arrived whole in {self._seconds:g} s (VOUCHSAFE_BODY_SECONDS)"
        return BodyTimeout(detail, retry_after=RETRY_SECONDS, limit=self._seconds)


class RequestBounds:
    """Bounds open requests, event streams, and request bodies in memory and in time.

    `request.state.body` is the request's Body: a handler that drops the bytes before it answers
    releases them there.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app = app
        self._clock = clock
        self._body_seconds = settings.body_seconds
        self._callers = settings.callers()
        self._requests = Allowance(
            "open requests", "VOUCHSAFE_MAX_OPEN_REQUESTS", settings.max_open_requests
        )
        self._streams = Allowance(
            "open event streams", "VOUCHSAFE_MAX_EVENT_STREAMS", settings.max_event_streams
        )
        self._bytes = Allowance(
            "bytes of request bodies",
            "VOUCHSAFE_MAX_BODY_BYTES_IN_FLIGHT",
            settings.max_body_bytes_in_flight,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request within the bounds, or leave it to `admitted` to refuse it."""
        if not _is_bounded(scope):
            await self._app(scope, receive, send)
            return
        owner = self._owner(scope)
        places = self._streams if scope["path"].endswith("/events") else self._requests
        try:
            places.take(owner)
        except Problem as problem:
            scope.setdefault("state", {})["refusal"] = problem
            await self._app(scope, receive, send)
            return
        body = Body(receive, self._bytes, owner, self._body_seconds, self._clock)
        scope.setdefault("state", {})["body"] = body

        async def send_on(message: Message) -> None:
            body.is_answered = True
            await send(message)

        try:
            await self._app(scope, body.receive, send_on)
        finally:
            body.release()
            places.give_back(owner)

    def _owner(self, scope: Scope) -> str | None:
        header = Headers(scope=scope).get("authorization")
        scheme, key = get_authorization_scheme_param(header)
        return owner_of(key, self._callers) if scheme.lower() == "bearer" else None


class HostCheck:
    """Answers this machine's own hosts and `hosts`, and requests of no other origin's pages.

    A web page whose name was pointed at this machine (DNS rebinding) sends that name as its `Host`.
    A form of another site names its own `Origin`; `origins` may send what they like.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with HostRefused or OriginRefused."""
        if _is_bounded(scope):
            try:
                self._check(scope)
            except Problem as problem:
                response = await render_problem(Request(scope), problem)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = ", ".join(headers.getlist("host")).lower()
        if not self._is_allowed(host, scope):
            raise HostRefused(
                f"Host {as_json(host)} is not answered: set API keys, or name the host in "
                "VOUCHSAFE_ALLOWED_HOSTS"
            )
        if scope["method"] in _SAFE_METHODS or "*" in self._origins:
            return
        for origin in map(str.lower, headers.getlist("origin")):
            # A proxy that ends TLS changes the scheme, so host and port alone are compared.
            if origin not in self._origins and _netloc(origin) != host:
                raise OriginRefused(
                    f"Pages of {as_json(origin)} may not send {scope['method']}: name the origin "
                    "in VOUCHSAFE_CORS_ORIGINS"
                )

    def _is_allowed(self, host: str, scope: Scope) -> bool:
        if "*" in self._hosts:
            return True
        if not (parts := _HOST.fullmatch(host)):
            return False
        name = parts[1]
        here, _ = scope.get("server") or ("", None)
        return name in self._hosts or name.strip("[]") == here or _is_local(name)


def _netloc(origin: str) -> str:
    """Host and port of an origin; empty where it names none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_local(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_bounded(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] not in _WATCHED
