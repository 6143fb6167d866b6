"""A task whose networks could not be loaded: why, and how long until they are tried again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from models.bundle import MODELS, Bundle, BundleError
from models.memory import TooLittleMemory, ran_out
from service.errors import as_json

REFUSAL_SECONDS = 30.0
"""How long a task that could not be loaded is refused before it is tried again."""
LONGEST_REFUSAL_SECONDS = 300.0
"""To which that doubles in a fleet, where a task is tried though nobody may ask for it."""
REST = 20.0
"""How many times as long as it took such a try is not repeated: the thread is there for others."""
LONGEST_REST_SECONDS = 3_600.0
"""Whatever it took, for that may have been a volume that hung."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What callers are told, and when it began and ends, in seconds of the same clock."""

    detail: str
    since: float
    until: float

    @classmethod
    def of(
        cls, bundle: Bundle, error: Exception, now: float, took: float, before: Self | None
    ) -> Self:
        """The refusal for this error of loading, which took so long: twice as long as the one
        before it, where that counts, and long enough for the thread to rest."""
        seconds = REFUSAL_SECONDS
        if before is not None:
            doubled = min(LONGEST_REFUSAL_SECONDS, 2 * (before.until - before.since))
            seconds = max(doubled, min(REST * took, LONGEST_REST_SECONDS))
        detail = f"Task {as_json(bundle.id)} cannot be loaded: {_reason(error, bundle)}"
        return cls(detail, now, now + seconds)


def _reason(error: Exception, bundle: Bundle) -> str:
    """What a caller may know; the log has the rest."""
    if isinstance(error, BundleError):
        return str(error).replace(f"{bundle.folder.parent}/", "").replace(f"{MODELS}/", "")
    if isinstance(error, TooLittleMemory):
        return f"there is too little memory: {error}"
    if ran_out(error):
        return "there is too little memory for its networks"
    return type(error).__name__
