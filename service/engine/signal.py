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


async def notified(event: asyncio.Event, deadline: float) -> bool:
    """Whether the event was set before `deadline`, in seconds of the event loop's clock."""
    if asyncio.get_running_loop().time() >= deadline:
        await asyncio.sleep(0)  # A loop over calls that do not wait leaves other tasks their turn.
        return False
    try:
        async with asyncio.timeout_at(deadline):
            return await event.wait()
    except TimeoutError:
        return False
