"""The device's one thread, and whether the device hangs or is broken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class DeviceFailed(RuntimeError):
    """The device hangs, is broken or out of memory: the process should exit and be restarted."""


class ComputeThread:
    """The one thread that models run in; its health is a by-product of its work.

    A hung call cannot be ended, and the interpreter waits for it at its exit: leave a process
    whose thread is not healthy through `os._exit`.
    """

    def __init__(self, *, batch_seconds_limit: float = 120.0) -> None:
        self._limit = batch_seconds_limit
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._since: float | None = None
        self._patience = batch_seconds_limit
        self._broken = False

    @property
    def healthy(self) -> bool:
        """False while a call runs past the limit, and for good once the device is broken."""
        since = self._since
        return not self._broken and (since is None or time.monotonic() - since < self._patience)

    @property
    def busy(self) -> bool:
        """Whether a call is running."""
        return self._since is not None

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Within a call: what runs inside may take so long, and the limit of a batch counts after.

        Networks are loaded so, for that is no device batch.
        """
        self._patience = seconds
        try:
            yield
        finally:
            self._since = time.monotonic()  # First: others read both in between.
            self._patience = self._limit

    def declare_broken(self) -> None:
        """Expect nothing of the device any more."""
        self._broken = True

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return or raise what the function does; calls run one at a time, in order."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._timed, function, *arguments)

    def close(self) -> None:
        """Take no more calls; one that is running goes on."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _timed(self, function: Callable[..., T], *arguments: Any) -> T:
        self._since = time.monotonic()
        try:
            return function(*arguments)
        finally:
            self._since = None
