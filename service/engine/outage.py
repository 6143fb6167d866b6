"""Whether the engine answers this process: told once when it does not, and once when it does."""

from __future__ import annotations

import logging
import time

from redis.exceptions import RedisError

logger = logging.getLogger("vouchsafe")

AWAY = (OSError, RedisError)
"""What an engine raises that is out of reach, or that cannot do now what it is asked."""


class Outage:
    """Whether the engine is out of reach: a line in the log as that begins, and one at its end."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._answered = float("-inf")

    @property
    def lasts(self) -> bool:
        """Whether the engine did not answer when it was last asked."""
        return self._since is not None

    def begin(self, error: Exception, asked: float) -> None:
        """What was asked then (time.monotonic) has no answer, and nothing asked since has one."""
        if self._since is None and self._answered <= asked:
            self._since = time.monotonic()
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            logger.warning("the engine is out of reach (%s); trying until it answers", reason)

    def end(self) -> None:
        """The engine has answered."""
        self._answered = time.monotonic()
        if self._since is not None:
            logger.info("the engine answers again after %.0f s", self._answered - self._since)
            self._since = None
