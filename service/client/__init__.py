"""Certified answers in Python: from a running service, or of one's own torch module."""

# Relative imports: an installation has this folder as the package `vouchsafe`.
from .arrays import certify
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
