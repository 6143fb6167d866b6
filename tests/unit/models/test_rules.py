"""models/evaluation/rules.py: what each rule answers, and how many rows it reads for that."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta, norm

from models.certificates.rules import certify
from models.evaluation.rules import RULES, Question, Rule, anytime, cohen, staged, two_sided

QUESTION = Question(sigma=0.25, alpha=0.001, classes=3, total_variation=0.0)
SELECTION = np.zeros(100, np.int16)
N = 10_000


def labels(*shares: float) -> NDArray[np.int16]:
    """N labels of which class c has the share shares[c], spread evenly over the rows."""
    counts = [round(share * N) for share in shares]
    assert sum(counts) == N
    whole = np.repeat(np.arange(len(shares)), counts)
    return np.random.default_rng(0).permutation(whole).astype(np.int16)


@pytest.mark.parametrize(("rule", "method"), [(cohen, "cohen"), (two_sided, "two-sided")])
def test_fixed_rules_read_all_rows(rule: Rule, method: str) -> None:
    """Both are `certify` on the whole votes, and do not depend on a target."""
    proven = certify([100, 0, 0], [9000, 700, 300], 0.25, 0.001, method=method)
    for question in (QUESTION, QUESTION.aiming_at(0.25)):
        answer = rule(question, SELECTION, labels(0.9, 0.07, 0.03))
        assert answer == (0, proven.radius, 100 + N)


@pytest.mark.parametrize(
    ("shares", "target", "certified", "rows"),
    [
        ((1.0, 0.0, 0.0), 0.25, True, 200),  # (.001/3)^(1/100) = .923 lies above Phi(1) = .841
        ((1.0, 0.0, 0.0), 0.5, True, 1100),  # ... and below Phi(2) = .977
        ((1.0, 0.0, 0.0), 0.9, False, 10_100),
        ((0.3, 0.7, 0.0), 0.25, False, 200),
        ((0.86, 0.14, 0.0), 0.25, True, 10_100),
    ],
)
def test_staged_sampling_ends_at_a_stage(
    shares: tuple[float, ...], target: float, certified: bool, rows: int
) -> None:
    """It ends where it proves the target, where it gives up, or on all rows."""
    answer = staged(QUESTION.aiming_at(target), SELECTION, labels(*shares))
    assert (answer.reaches(target), answer.rows) == (certified, rows)


def test_a_stage_has_a_third_of_alpha() -> None:
    """The radius at the last stage is that of the one-sided bound at alpha / 3, from its tail."""
    answer = staged(QUESTION.aiming_at(0.26), SELECTION, labels(0.86, 0.14, 0.0))
    p_lower = beta.ppf(0.001 / 3, 8600, 1401)
    assert answer.rows == 10_100
    assert answer.radius == pytest.approx(0.25 * norm.ppf(p_lower), rel=1e-9)


def test_staged_sampling_needs_a_target() -> None:
    """Without one there is nothing to stop for."""
    with pytest.raises(ValueError, match="target_radius = None"):
        staged(QUESTION, SELECTION, labels(1.0, 0.0, 0.0))


@pytest.mark.parametrize(("target", "rows"), [(0.25, 80), (0.5, 448)])
def test_agreement_ends_early_stopping(target: float, rows: int) -> None:
    """A unanimous image costs 16 selection rows and the first look that can prove the target."""
    answer = anytime(QUESTION.aiming_at(target), SELECTION, labels(1.0, 0.0, 0.0))
    assert (answer.reaches(target), answer.rows) == (True, rows)


def test_early_stopping_reads_only_its_rows() -> None:
    """Selection rows from the 17th on, and estimation rows after the look, do not matter."""
    selection, estimation = SELECTION.copy(), labels(0.9, 0.07, 0.03)
    question = QUESTION.aiming_at(0.25)
    answer = anytime(question, selection, estimation)
    assert answer.reaches(0.25)
    assert 80 < answer.rows < N
    selection[16:], estimation[answer.rows - 16 :] = 1, 2
    assert anytime(question, selection, estimation) == answer
    estimation[: answer.rows - 16] = 2
    assert not anytime(question, selection, estimation).reaches(0.25)


def test_without_a_target_early_stopping_draws_all_rows() -> None:
    """Its radius then lies below the two-sided rule's by less than .5 %, from 60 % upwards."""
    for share in (0.6, 0.8, 0.95, 0.99, 1.0):
        estimation = labels(share, 1.0 - share, 0.0)
        plain = two_sided(QUESTION, SELECTION, estimation)
        ours = anytime(QUESTION, SELECTION, estimation)
        assert ours.rows == plain.rows == 100 + N
        assert 0.995 * plain.radius < ours.radius < plain.radius


def test_an_abstention_reaches_nothing() -> None:
    """Neither does a label whose radius is below the target."""
    even = two_sided(QUESTION, SELECTION, labels(0.5, 0.5, 0.0))
    assert (even.label, even.radius, even.reaches(0.0)) == (None, 0.0, False)
    whole = two_sided(QUESTION, SELECTION, labels(1.0, 0.0, 0.0))
    assert whole.reaches(whole.radius)
    assert not whole.reaches(whole.radius + 1e-9)


def test_the_noise_s_total_variation_costs_radius() -> None:
    """Every rule takes it off its bounds."""
    blurred = replace(QUESTION, total_variation=1e-3)
    estimation = labels(0.95, 0.05, 0.0)
    for name, rule in RULES.items():
        radii = [
            rule(question.aiming_at(0.405), SELECTION, estimation).radius
            for question in (QUESTION, blurred)
        ]
        assert all(later < earlier for earlier, later in pairwise(radii)), name
