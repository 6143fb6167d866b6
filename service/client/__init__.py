"""Certified answers in Python: from a running service, or of one's own torch module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Relative imports: an installation has this folder as the package `vouchsafe`.
from .async_client import AsyncClient
from .client import Client
from .errors import (
    Busy,
    Conflict,
    DeadlinePassed,
    InvalidRequest,
    NotFound,
    ProblemError,
    ServiceFailed,
    Unauthorized,
    Unreachable,
    VouchsafeError,
)
from .events import Event
from .many import Answer

__all__ = [
    "Answer",
    "AsyncClient",
    "Busy",
    "Client",
    "Conflict",
    "DeadlinePassed",
    "Event",
    "InvalidRequest",
    "NotFound",
    "ProblemError",
    "ServiceFailed",
    "Unauthorized",
    "Unreachable",
    "VouchsafeError",
    "certify",
]

if TYPE_CHECKING:
    from .arrays import certify


def __getattr__(name: str) -> Any:
    """`certify`, which alone needs NumPy, once it is used."""
    if name == "certify":
        from .arrays import certify

        return certify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
