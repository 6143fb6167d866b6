"""What tests send over HTTP, and how they read what comes back."""

from __future__ import annotations

import json
from typing import Any

ANN = {"Authorization": "Bearer key-of-ann"}
BOB = {"Authorization": "Bearer key-of-bob"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{PARENT}-01"
"""A `traceparent`."""


def events(text: str) -> list[tuple[str, Any]]:
    """The (name, data) pairs of a server-sent stream."""
    blocks = [block for block in text.split("\r\n\r\n") if block.startswith("event:")]
    lines = [dict(line.split(": ", 1) for line in block.split("\r\n")) for block in blocks]
    return [(line["event"], json.loads(line["data"])) for line in lines]
