"""A wake-up for any number of waiting coroutines."""

from __future__ import annotations

import asyncio


class Signal:
    """Wakes every coroutine that waits for `next`, at each `notify`."""

    def __init__(self) -> None:
        self.next = asyncio.Event()

    def notify(self) -> None:
        """Wake the waiting coroutines; a later wait on `next` ends at the next call."""
        self.next.set()
        self.next = asyncio.Event()
