"""A wake-up for any number of waiting coroutines."""

from __future__ import annotations

import asyncio


class Signal:
    """Wakes everyone who has waited for `next` since it last rang."""

    def __init__(self) -> None:
        self.next = asyncio.Event()

    def notify(self) -> None:
        """Wake them; who waits from here on waits for the ring after this one."""
        self.next.set()
        self.next = asyncio.Event()
