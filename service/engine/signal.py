"""A wake-up for any number of waiting coroutines."""

from __future__ import annotations

import asyncio


class Bell:
    """Wakes everyone who has waited for `next_ring` since it last rang."""

    def __init__(self) -> None:
        self.next_ring = asyncio.Event()

    def ring(self) -> None:
        """Wake them; who waits from here on waits for the ring after this one."""
        self.next_ring.set()
        self.next_ring = asyncio.Event()
