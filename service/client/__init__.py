"""Certified answers in Python: from a running service, or of one's own torch module."""

# Relative imports: an installation has this folder as the package `vouchsafe`.
from .arrays import certify
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

__all__ = [
    "Busy",
    "Client",
    "Conflict",
    "DeadlinePassed",
    "InvalidRequest",
    "NotFound",
    "ProblemError",
    "ServiceFailed",
    "Unauthorized",
    "Unreachable",
    "VouchsafeError",
    "certify",
]
