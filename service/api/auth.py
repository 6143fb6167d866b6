"""Authentication of callers by their keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.errors import Unauthorized

_bearer = HTTPBearer(auto_error=False, description="A key, where the service has any.")


def caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
) -> str | None:
    """The name that owns the bearer key, or None for a service without keys.

    Keys are looked up by their SHA-256, so timing does not reveal them. Raises Unauthorized for a
    missing or an unknown key.
    """
    callers: Mapping[bytes, str] = request.app.state.services.callers
    if not callers:
        return None
    if credentials is None:
        raise Unauthorized("Send a key: Authorization: Bearer <key>")
    name = owner_of(credentials.credentials, callers)
    if name is None:
        raise Unauthorized("The key is not known here")
    return name


def owner_of(key: str, callers: Mapping[bytes, str]) -> str | None:
    """The name that owns a key, or None for an unknown key."""
    return callers.get(hashlib.sha256(key.encode()).digest())
