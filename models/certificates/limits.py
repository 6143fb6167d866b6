"""Limits of questions, without a numerical library: the command line starts with them."""

from __future__ import annotations

MOST_ROWS = 100_000
"""Most estimation rows of a question: rounding errors were measured up to here."""

MIN_STAGES, MAX_STAGES = 2, 4
"""Numbers of noise levels of a cascade."""
