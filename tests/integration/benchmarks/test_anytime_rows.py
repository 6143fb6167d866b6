"""benchmarks/anytime_rows.py: simulated rows, and how seldom a target is given up wrongly."""

from __future__ import annotations

from math import floor
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.anytime_rows import LOG_N, logged_probabilities, rows_of, simulate
from models.certificates.anytime import Decision
from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import certified_radius

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


def test_the_two_sided_rule_reads_the_same_votes() -> None:
    """Whatever p, early stopping proves nearly all that all rows would, and nothing at p = 1/2."""
    p = np.repeat([0.5, 0.8, 0.87, 0.9, 1.0], 200)
    found = simulate(p, 1, 1.0, 10_000, 0.001)
    assert not (found.fixed | found.reached)[:400].any()
    assert found.fixed[600:].all()
    assert found.reached[600:].all()
    assert (found.reached & found.fixed).sum() >= 0.99 * found.fixed.sum()
    assert (found.rows[found.fixed] >= 57).all()
    assert (found.rows <= 10_000).all()


def test_a_log_gives_back_its_votes(tmp_path: Path) -> None:
    """Radii printed to three digits give the votes' share nearly; an abstention gives one half."""
    counts = [55_000, 84_000, 99_000, LOG_N]
    radii = [certified_radius(clopper_pearson_lower(k, LOG_N, 0.001), 0.25) for k in counts]
    lines = [f"{i}\t0\t0\t{floor(r * 1000) / 1000}\t1\t0" for i, r in enumerate(radii)]
    log = tmp_path / "log.tsv"
    header = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    log.write_text("\n".join([header, *lines, "4\t0\t-1\t0.0\t0\t0", ""]))
    found = logged_probabilities(log, 0.25)
    assert found[:4] == pytest.approx([k / LOG_N for k in counts], abs=0.002)
    assert found[4] == 0.5
