"""models/evaluation/logs/audit.py: reused noise is found, and independent rows are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from models.evaluation.logs.audit import (
    FACTORS,
    LEVEL,
    Audit,
    audit,
    factor_tests,
    joint_p_value,
    largest_chance,
)
from models.evaluation.logs.reading import read_log
from tests.support.logs import CIFAR, IMAGENET, published, radius_of, write_log

N, SIGMA, ALPHA = 10_000, 0.25, 0.001


def audited(path: Path, n: int = N, sigma: float = SIGMA) -> Audit:
    return audit(read_log(path), n, sigma, ALPHA)


# --- Independent rows ----------------------------------------------------------------------------


HONEST: dict[str, Callable[[np.random.Generator], NDArray[np.float64]]] = {
    "near-full": lambda rng: np.full(120, 6 / N),
    "spread": lambda rng: rng.beta(0.1, 2.0, 300),
    "all at sixteen": lambda rng: np.full(200, 16 / N),
    "all at four": lambda rng: np.full(200, 4 / N),
    "few": lambda rng: rng.uniform(0, 40 / N, 8),
    "one or nothing": lambda rng: rng.choice([0.5 / N, 30 / N], 150),
}


READABLE = {
    "all": np.arange(1, 200),
    "with gaps": np.array([*range(1, 14), 16, 19]),  # That of three digits at sigma 0.5.
}


@pytest.mark.parametrize("readable", READABLE)
@pytest.mark.parametrize("name", HONEST)
def test_false_alarms_keep_to_the_level(name: str, readable: str) -> None:
    """Of 1,000 simulated logs of independent rows, a p-value below 0.05 has at most 5 %.

    Four standard errors are allowed: 0.05 + 4 * 0.0069. Probabilities near a factor are the worst.
    """
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(1000):
        missed = rng.binomial(N, HONEST[name](rng))
        tests = factor_tests(missed, N, READABLE[readable])
        alarms += joint_p_value(tests) <= 0.05
    assert alarms / 1000 <= 0.05 + 4 * 0.0069


def test_simulated_honest_logs_show_nothing(tmp_path: Path) -> None:
    """Through print and inversion, too: no finding in forty logs, whatever the sigma."""
    rng = np.random.default_rng(11)
    for sigma in (0.25, 0.5) * 20:
        missed = rng.binomial(N, rng.beta(0.15, 2.0, 300))
        found = audited(write_log(tmp_path / "log.tsv", missed.tolist(), N, sigma), sigma=sigma)
        assert not found.found
        assert found.remaining is None
        assert found.inversion.inconsistent == 0


def test_without_a_near_full_tally_there_is_no_evidence() -> None:
    """The p-value is 1, and it is multiplied by a number of factors that no tally changes."""
    tests = factor_tests(np.array([0, 0, 300]), N, READABLE["all"])
    assert [test.factor for test in tests] == [*FACTORS]
    assert joint_p_value(tests) == 1.0
    assert factor_tests(np.array([0, 1]), N, np.array([1, 3])) == []
    assert joint_p_value([]) == 1.0


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("multiples", [1, 5])
@pytest.mark.parametrize("gaps", [(), (1, 7)])
def test_the_chance_is_the_least_upper_bound(
    factor: int, multiples: int, gaps: tuple[int, ...]
) -> None:
    """Some probability of a vote makes multiples so probable, and none more: SciPy's pmf."""
    values = np.array([m for m in range(1, factor * (multiples + 1)) if m not in gaps])
    bound = largest_chance(factor, tuple(values.tolist()), N)
    shares = [0.0]
    for mean in np.geomspace(0.02, 20 * values[-1], 397):
        mass = binom.pmf(values, N, mean / N)
        if mass.sum() > 1e-200:
            shares.append(float(mass[values % factor == 0].sum() / mass.sum()))
    assert max(shares) <= bound * (1 + 1e-6)
    assert max(shares) == pytest.approx(bound, rel=0.01)


# --- Reused noise --------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
def test_votes_that_occur_several_times_are_found(tmp_path: Path, factor: int) -> None:
    """The factor is that of the simulation, though its divisors fit, too."""
    n = N // factor * factor
    rng = np.random.default_rng(factor)
    missed = factor * rng.binomial(n // factor, rng.beta(0.1, 2.0, 300))
    found = audited(write_log(tmp_path / "log.tsv", missed.tolist(), n, SIGMA), n)
    assert (found.found, found.factor, found.effective_n) == (True, factor, n // factor)
    assert found.missing == tuple(range(n - factor + 1, n))
    assert found.p_value < LEVEL


def test_what_remains_is_certified_by_the_effective_rows(tmp_path: Path) -> None:
    """Radii are those of a quarter of the rows and votes; too small ones are no answers."""
    missed = [0, 0, 4, 8, 4, 12, 4, 16, 8, 4, 12, 4, 8, 4, 4840]
    found = audited(write_log(tmp_path / "log.tsv", missed, N, SIGMA))
    radii = [radius_of(2500 - m // 4, 2500, SIGMA) for m in missed]
    assert found.remaining is not None
    assert found.remaining.average_certified_radius == pytest.approx(sum(radii) / len(missed))
    assert found.printed.certified[0.0] == 1.0
    assert radii[-1] == 0
    assert found.remaining.certified[0.0] == pytest.approx(14 / 15)
    assert (found.printed.certified[0.75], found.remaining.certified[0.75]) == (2 / 15, 0)


def test_few_tallies_prove_nothing(tmp_path: Path) -> None:
    """Three multiples of four are no finding, and the audit says that the log has too few."""
    found = audited(write_log(tmp_path / "log.tsv", [0, 4, 8, 12], N, SIGMA))
    assert not found.found
    assert not found.conclusive
    assert found.least_p_value > LEVEL


# --- Settings that are not the log's -------------------------------------------------------------


def test_other_settings_are_refused(tmp_path: Path) -> None:
    """Too few rows, another rule's radii, a larger n that would look like reuse, no certificate."""
    rng = np.random.default_rng(3)
    log = write_log(tmp_path / "log.tsv", rng.binomial(N, rng.beta(0.1, 2, 300)).tolist(), N, SIGMA)
    with pytest.raises(ValueError, match=r"radius = 0.8 of idx \d+: the largest is 0.615 for n"):
        audited(log, 1000)
    with pytest.raises(ValueError, match=r"of \d+ radii are not those of Cohen's rule"):
        audited(log, 20_000)
    with pytest.raises(ValueError, match="no image has all 100000 votes"):
        audited(log, 100_000)
    with pytest.raises(ValueError, match="n = 9 at alpha"):
        audited(log, 9)
    with pytest.raises(ValueError, match="n = 1000001: the largest n"):
        audited(log, 1_000_001)
    with pytest.raises(ValueError, match="no certified image"):
        audited(write_log(tmp_path / "none.tsv", [N // 2] * 3, N, SIGMA))


# --- Published logs ------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "fours", "tallies"), [(0.25, 31, 35), (0.5, 23, 24)])
def test_the_finding_on_the_paper_s_logs(sigma: float, fours: int, tallies: int) -> None:
    """Four devices, one noise: method.md section 2's counts, and no tally of 9997 to 9999."""
    found = audited(published(f"{IMAGENET}{sigma:.2f}"), sigma=sigma)
    (test,) = [test for test in found.tests if test.factor == 4]
    assert (test.multiples, test.tallies) == (fours, tallies)
    counts = found.inversion
    least = counts.least[(counts.least == counts.most) & (counts.least >= 9980)]
    near_full = least[least < N]
    assert len(near_full) == tallies
    assert (near_full % 4 == 0).sum() == fours
    assert (found.factor, found.effective_n) == (4, 2500)
    assert found.missing == (9997, 9998, 9999)
    assert found.p_value < 1e-6
    assert counts.inconsistent == 0


def test_what_remains_of_the_paper_s_table() -> None:
    """At radius 0.75 and sigma 0.25, 21.6 % become 0."""
    found = audited(published(f"{IMAGENET}0.25"))
    assert found.remaining is not None
    assert (found.printed.certified[0.75], found.remaining.certified[0.75]) == (0.216, 0)
    assert found.remaining.average_certified_radius < found.printed.average_certified_radius


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_nothing_is_found_on_cohen_s_logs(sigma: float) -> None:
    """They have hundreds of near-full tallies, so a reuse would have been seen."""
    found = audited(published(f"{CIFAR}{sigma:.2f}"), 100_000, sigma)
    assert not found.found
    assert found.conclusive
    assert found.p_value > 0.5
    assert found.inversion.inconsistent == 0
