"""Problems over HTTP: the handler that renders every error, and their part of /docs."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPMethod, HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles

from service import errors
from service.errors import (
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    Problem,
    Unauthorized,
)
from service.operations.metrics import REJECTIONS
from service.validation import invalid_fields

MEDIA_TYPE = "application/problem+json"
V2 = "/v2/"
"""With "/" added, the begin of every address of the Open Inference Protocol."""
_EXPECTED = (Problem, HTTPException, RequestValidationError)


class ProblemResponse(BaseModel):
    """An error, as RFC 9457 describes it."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Names the kind of error, for programs; it never changes.")
    title: str = Field(description="The kind of error, for people.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="This error, and what to change.")
    limit: float | None = Field(None, description="The limit that was exceeded, if it is one.")
    errors: list[dict[str, Any]] | None = Field(
        None,
        description="Each invalid field: `field`, `detail`; `value` and `limit` where they apply.",
    )


async def render_problem(request: Request, error: Exception) -> Response:
    """Any error as a problem document; an unexpected error is reported without details.

    Below V2 an error has the Open Inference Protocol's form.
    """
    problem = _as_problem(error)
    document = problem.document()
    REJECTIONS.labels(document["type"].rpartition(":")[2]).inc()
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(problem, MethodNotAllowed):
        headers["Allow"] = ", ".join(_allowed(request))
    if not isinstance(error, _EXPECTED):
        headers["Connection"] = "close"  # The server closes it once the error is logged.
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    if isinstance(problem, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if f"{request.scope['path']}/".startswith(V2):
        return JSONResponse({"error": document["detail"]}, document["status"], headers)
    return JSONResponse(document, document["status"], headers, media_type=MEDIA_TYPE)


PROBLEM_HANDLERS: Mapping[int | type[Exception], Any] = dict.fromkeys(
    (*_EXPECTED, Exception), render_problem
)
"""An app's `exception_handlers`: every error is a problem document."""


def _as_problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return invalid_fields([e | {"loc": _named(e["loc"])} for e in error.errors()])
    if isinstance(error, HTTPException):
        kinds: dict[int, type[Problem]] = {404: NotFound, 405: MethodNotAllowed}
        return kinds.get(error.status_code, MalformedRequest)(error.detail)
    return Problem("The service failed; its log has the reason")


def _allowed(request: Request) -> list[str]:
    """The methods that the address supports: those of its routes, and HEAD beside GET."""

    def supports(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    if isinstance(request.scope.get("endpoint"), StaticFiles):
        return ["GET", "HEAD"]
    methods = {method.value for method in HTTPMethod if supports(method)}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def _named(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A parameter's location, without `query`."""
    return loc[1:] if loc[:1] == ("query",) else loc


def problem_responses(*kinds: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the problems that a route can raise."""
    responses: dict[int | str, dict[str, Any]] = {}
    schema = ProblemResponse.model_json_schema()
    for kind in kinds:
        example = kind("This error, and what to change").document()
        described = responses.setdefault(
            kind.status,
            {
                "description": HTTPStatus(kind.status).phrase,
                "content": {MEDIA_TYPE: {"schema": schema, "examples": {}}},
            },
        )
        described["content"][MEDIA_TYPE]["examples"][kind.slug] = {"value": example}
    return responses


KEYED = problem_responses(
    errors.Unauthorized,
    errors.OriginRefused,
    errors.HostRefused,
    errors.TooManyOpen,
    errors.EngineUnavailable,
    errors.Overloaded,
)
"""OpenAPI's `responses` of every route that takes a key."""
