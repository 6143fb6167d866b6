"""The bound on a unit test: CPU time of its own, which other processes do not lengthen."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

MOST_SECONDS = 2.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fails a test that used more CPU time; tests like that belong in `integration`."""
    began = time.process_time()
    yield
    used = time.process_time() - began
    if used > MOST_SECONDS:
        pytest.fail(f"used {used:.1f} s of CPU; a unit test may use {MOST_SECONDS:.0f} s")
