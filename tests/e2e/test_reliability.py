"""A fleet's parts killed, stopped and hung, in the short form of `benchmarks.reliability`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fleet import default_model
from benchmarks.reliability import EXPECTED, SCENARIOS, faults, run
from models.smoothing import SmoothedModel

LONG = {"redis killed, always", "noise of 1 worker", "noise of 4 workers"}
"""Scenarios that differ in a figure only from one that every run has."""


@pytest.fixture(scope="module")
def model() -> SmoothedModel:
    return default_model()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in SCENARIOS],
)
async def test_nothing_is_lost_or_counted_twice(
    name: str, model: SmoothedModel, redis_program: None, tmp_path: Path
) -> None:
    """Every job ends as it must, with the votes of each of its rows, counted once."""
    figures = await run(name, tmp_path, model, short=True)
    assert faults(figures) == {}
    assert figures["jobs"] >= 1


def test_faults_are_found() -> None:
    """A figure that is not as it must be is told."""
    assert faults(dict(EXPECTED)) == {}
    assert faults({"wrong tallies": 1, "jobs": 3}) == {"wrong tallies": 1}
