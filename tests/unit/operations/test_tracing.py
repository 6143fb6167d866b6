"""service/operations/tracing.py: what W3C Trace Context says of valid headers and others."""

from __future__ import annotations

import pytest

from service.operations.tracing import begun, received, trace_id
from tests.support.http import PARENT, TRACE, VALID


def test_the_standards_example_is_kept() -> None:
    """The header that the standard shows is valid, and is kept as it is."""
    assert received([VALID]) == VALID
    assert trace_id(VALID) == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"ff-{TRACE}-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT[:-1]}g-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"01-{TRACE}-{PARENT}-01more",
        f"00_{TRACE}_{PARENT}_01",
    ],
)
def test_what_is_not_valid_is_ignored(header: str) -> None:
    """A version that must not be, ids of zeros, capitals, lengths and what follows version 00."""
    assert received([header]) is None


def test_one_header_alone_is_valid() -> None:
    """None at all, and two of them, are no context."""
    assert received([]) is None
    assert received([VALID, VALID]) is None


def test_later_versions_are_read_as_the_first() -> None:
    """What version 00 knows is read of a later one, and told as version 00."""
    assert received([f"cc-{TRACE}-{PARENT}-01-what-the-future-holds"]) == VALID
    assert received([f"cc-{TRACE}-{PARENT}-01"]) == VALID


def test_unknown_flags_are_cleared() -> None:
    """Only flags that have a meaning travel on."""
    assert received([f"00-{TRACE}-{PARENT}-ff"]) == f"00-{TRACE}-{PARENT}-03"
    assert received([f"00-{TRACE}-{PARENT}-04"]) == f"00-{TRACE}-{PARENT}-00"


def test_a_begun_trace_is_valid_and_new() -> None:
    """What is made here others take, and no two are one trace."""
    one, other = begun(), begun()
    assert received([one]) == one
    assert trace_id(one) != trace_id(other)
    assert trace_id(None) is None
