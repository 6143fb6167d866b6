"""Compute thread of the device, and its health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class DeviceFailed(RuntimeError):
    """The device hangs, is broken or out of memory; the process must exit and be restarted."""


class ComputeThread:
    """The thread that models run in; unhealthy where a call exceeds `batch_seconds_limit`.

    A hung call cannot be ended, and the interpreter waits for it at exit: end a process whose
    thread is not healthy by `os._exit`.
    """

    def __init__(self, *, batch_seconds_limit: float = 120.0) -> None:
        self._limit = batch_seconds_limit
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._since: float | None = None
        self._patience = batch_seconds_limit
        self._broken = False

    @property
    def healthy(self) -> bool:
        """False while a call runs past its limit, and always once the device is broken."""
        since = self._since
        return not self._broken and (since is None or time.monotonic() - since < self._patience)

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        return self._since is not None

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """A context within a call that may take `seconds`, for loading networks.

        The limit of a batch applies again from its end.
        """
        self._patience = seconds
        try:
            yield
        finally:
            self._since = time.monotonic()  # First: the event loop may read both in between.
            self._patience = self._limit

    def declare_broken(self) -> None:
        """Mark the device as broken, for good."""
        self._broken = True

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of `function(*arguments)`, run in the thread; calls run one by one, in order.

        Raises what the function raises.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._timed, function, *arguments)

    def close(self) -> None:
        """Reject further calls, and cancel the waiting ones; a running call continues."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _timed(self, function: Callable[..., T], *arguments: Any) -> T:
        self._since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._since = None
