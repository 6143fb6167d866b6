"""Server-sent events of jobs and tasks."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One event: its kind, such as `progress`, and its document."""

    kind: str
    data: dict[str, Any]


class EventParser:
    """Events from the lines of a stream (WHATWG, text/event-stream)."""

    def __init__(self) -> None:
        self._kind, self._data = "message", ""

    def feed(self, line: str) -> Event | None:
        """The event that this line completes, or None."""
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "data":
            self._data += value
        elif not line and self._data:
            event = Event(self._kind, json.loads(self._data))
            self._kind, self._data = "message", ""
            return event
        return None
