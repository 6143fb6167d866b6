"""Backoff of a task whose networks could not be loaded, and the reason for callers."""

from __future__ import annotations

from collections.abc import Callable

from models.bundle import MODELS, Bundle, BundleError
from models.memory import TooLittleMemory, ran_out
from service.errors import as_json

FIRST_SECONDS = 30.0
LONGEST_SECONDS = 300.0


class Backoff:
    """Withholds a task for 30 s after a failure, doubled at each consecutive one, up to 300 s."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._until = float("-inf")

    @property
    def is_over(self) -> bool:
        """Whether the task may be loaded."""
        return self._clock() >= self._until

    def fail(self) -> None:
        """Withhold the task from now on."""
        self._seconds = min(2 * self._seconds or FIRST_SECONDS, LONGEST_SECONDS)
        self._until = self._clock() + self._seconds

    def succeed(self) -> None:
        """End the withholding, and reset its time to 30 s."""
        self._seconds, self._until = 0.0, float("-inf")


def cannot_load(bundle: Bundle, error: Exception) -> str:
    """The reason, without paths, for the problem document; the log has the full error."""
    return f"Task {as_json(bundle.id)} cannot be loaded: {_reason(error, bundle)}"


def _reason(error: Exception, bundle: Bundle) -> str:
    if isinstance(error, BundleError):
        return str(error).replace(f"{bundle.folder.parent}/", "").replace(f"{MODELS}/", "")
    if isinstance(error, TooLittleMemory):
        return f"there is too little memory: {error}"
    if ran_out(error):
        return "there is too little memory for its networks"
    return type(error).__name__
