"""W3C Trace Context: the `traceparent` that connects a job to its request."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})"
    r"-(?!0{16})(?P<parent>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_KNOWN_FLAGS = 0b11  # sampled, random-trace-id


def received(values: Sequence[str]) -> str | None:
    """The caller's context in the format of version 00; None for a missing or invalid header.

    `values` are those of all `traceparent` headers of the request; more than one is invalid. From
    later versions, the fields of version 00 are read, and unknown flags are cleared.
    """
    found = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if found is None or (found["version"] == "00" and found["more"]):
        return None
    flags = int(found["flags"], 16) & _KNOWN_FLAGS
    return f"00-{found['trace']}-{found['parent']}-{flags:02x}"


def begun() -> str:
    """A context of a new trace, which is not sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def trace_id(traceparent: str | None) -> str | None:
    """The trace (32 hexadecimal digits) of a context, or None."""
    return None if traceparent is None else traceparent[3:35]
