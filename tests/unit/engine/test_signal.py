"""service/engine/signal.py: waiting for a notification, up to a deadline."""

from __future__ import annotations

import asyncio

from service.engine.signal import Signal, notified


async def test_a_notification_ends_the_wait() -> None:
    """Who waits returns at the notification, and learns that there was one."""
    signal = Signal()
    now = asyncio.get_running_loop().time()
    waiting = asyncio.create_task(notified(signal.next, now + 60))
    await asyncio.sleep(0)
    signal.notify()
    async with asyncio.timeout(30):
        assert await waiting
    assert not await notified(signal.next, now + 0.001)


async def test_a_past_deadline_leaves_others_their_turn() -> None:
    """A loop over calls whose time is up does not keep the event loop from other tasks."""
    ran = asyncio.Event()
    asyncio.get_running_loop().call_soon(ran.set)
    for _ in range(3):
        assert not await notified(Signal().next, float("-inf"))
    assert ran.is_set()
