"""Connections of both clients: checked addresses, keys and timeouts."""

from __future__ import annotations

from typing import Any

import httpx

GRACE_SECONDS = 30.0
"""Seconds beyond the wait in which the response must arrive."""
EVENTS_SECONDS = 60.0
"""Longest silence of an event stream, in which something comes every few seconds."""


def checked(url: str, timeout: float) -> float:
    """The timeout; raises ValueError for a malformed one, and for another scheme than HTTP."""
    if not timeout > 0.0:
        raise ValueError(f"timeout = {timeout}: must be greater than 0 seconds")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url = {url!r}: must begin with http:// or https://")
    return timeout


def options(url: str, key: str | None) -> dict[str, Any]:
    """The arguments of an httpx client."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url, "headers": headers, "limits": httpx.Limits(max_connections=None)}
