"""ASGI middleware that bounds open requests and bodies, and checks hosts and origins.

Probes and /metrics are exempt, so a full service can be monitored.
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

_WATCHED = frozenset(
    {"/livez", "/readyz", "/startupz", "/metrics", "/v2/health/live", "/v2/health/ready"}
)
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
    """Add the bounds, and the checks of hosts and origins that the settings require."""
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
    """Raise the problem of RequestBounds, here, where metrics have the request's route."""
    problem: Problem | None = getattr(request.state, "problem", None)
    if problem is not None:
        raise problem


class Allowance:
    """An amount that all callers share; one key may hold half of it."""

    def __init__(self, noun: str, setting: str, limit: int) -> None:
        self._noun, self._setting, self._limit = noun, setting, limit
        self._held = 0
        self._held_by: Counter[str] = Counter()

    def take(self, owner: str | None, amount: int = 1) -> None:
        """Hold `amount` more for a key's owner, or for a caller without a key.

        Raises TooManyOpen above half of the limit for one owner, and Overloaded above the limit
        for all callers.
        """
        half = self._limit // 2
        if owner is not None and self._held_by[owner] + amount > half:
            detail = f"This key may have {half} {self._noun} at once; end some, or try again later"
            raise TooManyOpen(detail, retry_after=RETRY_SECONDS, limit=half)
        if self._held + amount > self._limit:
            detail = (
                f"The service takes {self._limit} {self._noun} at once ({self._setting}); "
                "try again later"
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
    """A request's body as it arrives: bounded by an allowance of bytes and by a time limit."""

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
        self._is_complete = False
        self.is_answered = False
        """Whether the response has begun; no problem can be reported then."""

    async def receive(self) -> Message:
        """The connection's next message; raises BodyTimeout, TooManyOpen and Overloaded.

        Once the response has begun, a disconnect is returned instead.
        """
        if self._is_complete:
            return await self._receive()
        try:
            return await self._next_part()
        except Problem:
            if self.is_answered:
                return {"type": "http.disconnect"}
            raise

    def release(self) -> None:
        """Return the body's bytes to the allowance, once they are dropped."""
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
            self._is_complete = not message.get("more_body", False)
            if not self._is_complete and self._clock() > self._deadline:
                raise self._too_slow()
        return message

    def _too_slow(self) -> BodyTimeout:
        detail = f"The body has not arrived whole in {self._seconds:g} s (VOUCHSAFE_BODY_SECONDS)"
        return BodyTimeout(detail, retry_after=RETRY_SECONDS, limit=self._seconds)


class RequestBounds:
    """Bounds open requests, event streams, and request bodies in memory and in time.

    `request.state.body` is the request's Body. A handler that drops the bytes before it responds
    calls its `release`.
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
        """Serve the request within the bounds; `admitted` rejects it beyond them."""
        if not _is_bounded(scope):
            await self._app(scope, receive, send)
            return
        owner = self._owner(scope)
        is_stream = scope["path"].endswith(("/events", "/results"))
        places = self._streams if is_stream else self._requests
        try:
            places.take(owner)
        except Problem as problem:
            scope.setdefault("state", {})["problem"] = problem
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
    """Rejects foreign hosts and origins; allowed are this machine's, `hosts` and `origins`.

    A web page whose name resolves to this machine (DNS rebinding) sends that name as `Host`. A form
    of another site sends its own `Origin`.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with HostRefused or OriginRefused."""
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
            # A proxy that ends TLS changes the scheme, so only host and port are compared.
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
    """Host and port of an origin; empty for an origin without them."""
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
