"""benchmarks/anytime_rows.py: simulated rows, and how seldom a target is given up wrongly."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from benchmarks.anytime_rows import rows_of
from models.anytime import Decision

RUNS = 1000


@pytest.mark.parametrize(
    ("p", "others", "target", "reached"),
    [
        # The true radii, in sigma: 1.243, 0.842, 0.484, 1.463, 0.980.
        (0.8, 4, 1.1, 0.95),
        (0.8, 1, 0.79, 0.5),
        (0.5, 3, 0.43, 0.3),
        (0.9, 2, 1.38, 0.6),
        (0.6, 9, 0.9, 0.4),
    ],
)
def test_what_can_be_proven_is_seldom_given_up(
    p: float, others: int, target: float, reached: float
) -> None:
    """Where the true radius lies above the target, at most one run in a hundred is hopeless."""
    _, ended, share = rows_of(p, others, target, 10_000, 0.001, RUNS)
    assert ended[Decision.HOPELESS] <= binom.ppf(1 - 1e-6, RUNS, 0.01)
    assert share >= reached


def test_agreement_costs_one_look_and_a_lost_cause_few() -> None:
    """Unanimous votes end at the first look that can prove; p = 0.6 cannot reach 1.28 sigma."""
    assert rows_of(1.0, 1, 1.0, 10_000, 0.001, 50) == (64.0, {"reached": 50}, 1.0)
    mean, ended, share = rows_of(0.6, 1, 1.28, 10_000, 0.001, 500)
    assert mean < 100
    assert ended == {"hopeless": 500}
    assert share == 0.0


def test_a_run_repeats_itself() -> None:
    """The noise is seeded: the same settings give the same rows."""
    settings = (0.9, 2, 1.0, 1000, 0.01, 100)
    assert rows_of(*settings) == rows_of(*settings)
