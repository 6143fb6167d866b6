"""models/certificates/rules.py against exact vectors and closed-form truths; Cohen's rule first."""

from __future__ import annotations

import functools
import json
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from models.certificates.alpha import METHODS
from models.certificates.bounds import clopper_pearson_lower
from models.certificates.rules import (
    Certificate,
    certify,
    check_certify,
    check_predict,
    predict,
    smallest_n_certify,
    smallest_n_predict,
)
from tests.support.paths import DATA, SHARED

VECTORS = json.loads((DATA / "certificates/vectors.json").read_text())
ORACLES = SHARED / "oracles"
TOLERANCE = Decimal("1e-9")
ALPHAS = st.floats(1e-9, 0.5)
# A busy machine must not fail a property for taking its time.
UNHURRIED = settings(deadline=None)


def certify_votes(
    k: int, n: int, alpha: float, sigma: float = 1.0, total_variation: float = 0.0
) -> Certificate:
    """Cohen's CERTIFY where class 1 is selected and gets k of n estimation votes."""
    return certify(
        [0, 100], [n - k, k], sigma, alpha, method="cohen", total_variation=total_variation
    )


# --- Known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 11, 37, 100, 1000, 10_000, 100_000])
def test_certify_is_just_below_the_exact_answer(n: int) -> None:
    """Bound, p_lower and radius lie in (exact - 1e-9, exact], and only they decide abstention."""
    vectors = [vector for vector in VECTORS["certify"] if vector["n"] == n]
    assert any(vector["k"] == 0 for vector in vectors)
    assert any(vector["k"] == n for vector in vectors)
    for vector in vectors:
        k, alpha = vector["k"], vector["alpha"]
        bound = clopper_pearson_lower(k, n, alpha)
        got = certify_votes(k, n, alpha, vector["sigma"], vector["total_variation"])
        assert got.radius is not None
        assert got.p_lower is not None
        found = {"bound": bound, "p_lower": got.p_lower, "radius": got.radius}
        for name, value in found.items():
            gap = Decimal(vector[name]) - Decimal(value)
            assert 0 <= gap < TOLERANCE, (name, vector)
        assert got.abstained == (Decimal(vector["p_lower"]) <= Decimal("0.5")), vector


def test_the_vectors_cover_what_they_should() -> None:
    """The known answers hold 150 radii, and bounds on both sides of 1/2 and close to it."""
    bounds = [float(vector["p_lower"]) for vector in VECTORS["certify"]]
    assert sum(bound > 0.5 for bound in bounds) >= 150
    assert any(0.0 < bound - 0.5 < 1e-3 for bound in bounds)
    assert any(0.0 < 0.5 - bound < 1e-3 for bound in bounds)


def test_predict_decides_like_the_exact_binomial_test() -> None:
    """PREDICT answers exactly where the rational two-sided p-value is at most alpha."""
    for vector in VECTORS["predict"]:
        got = predict(vector["counts"], vector["alpha"])
        assert got.abstained != vector["answers"], vector
        assert got.label == (int(np.argmax(vector["counts"])) if vector["answers"] else None)


def test_the_largest_radius_of_cohen_at_a_thousand_rows() -> None:
    """A unanimous n = 1,000 at alpha = 0.001 certifies 2.46 sigma (method.md section 6)."""
    assert certify_votes(1000, 1000, 0.001, 0.25).radius == pytest.approx(2.46 * 0.25, abs=2e-3)


def test_certify_fills_every_field() -> None:
    """A certificate repeats the question and holds the estimation counts as plain integers."""
    votes = np.array([1, 2, 97]), np.array([10, 20, 970])
    got = certify(*votes, 0.5, 0.001, method="cohen")
    assert got.label == 2
    assert not got.abstained
    assert got.counts == (10, 20, 970)
    assert all(type(count) is int for count in got.counts)
    assert (got.n0, got.n, got.alpha, got.sigma) == (100, 1000, 0.001, 0.5)
    assert (got.method, got.runner_up, got.p_upper) == ("cohen", None, None)


@pytest.mark.parametrize("votes", [(30, 70), (5, 20, 3), (1, 17)])
def test_predict_pays_for_noise_that_is_not_ideal(votes: tuple[int, ...]) -> None:
    """It abstains where the p-value is above alpha less n times a row's total variation: each row
    as drawn may differ from an ideal one by that much."""
    n, (second, top) = sum(votes), sorted(votes)[-2:]
    p = binomtest(top, top + second, 0.5).pvalue
    room = 1e-6
    for distance, abstains in ((0.0, False), (0.9 * room / n, False), (1.1 * room / n, True)):
        got = predict(votes, p + room, total_variation=distance)
        assert got.abstained == abstains


def test_predictions_that_the_noise_alone_makes_impossible_are_refused() -> None:
    """Where n rows spend all of alpha no votes could answer; an alpha that works is named."""
    with pytest.raises(ValueError, match=r"^alpha = 1e-08 with n = 100000 .* is about 8e-08$"):
        check_predict(100_000, 1e-8, 8e-13)
    check_predict(100_000, 8.1e-8, 8e-13)
    check_predict(1_000, 1e-8, 8e-13)


def test_predict_proves_no_radius() -> None:
    """PREDICT has no radius, no bound, no selection rows and no sigma."""
    got = predict((3, 90, 7), 0.001)
    assert got == Certificate(
        1, None, False, None, None, None, (3, 90, 7), 0, 100, 0.001, None, "binomial"
    )


@pytest.mark.parametrize("method", METHODS)
def test_an_abstention_of_certify_has_radius_zero(method: str) -> None:
    """Where CERTIFY abstains the label is None and the radius 0.0; the bound is there."""
    got = certify([60, 40], [500, 500], 0.25, 0.001, method=method)
    assert (got.label, got.abstained, got.radius) == (None, True, 0.0)
    assert got.p_lower is not None
    assert 0.4 < got.p_lower < 0.5


# --- Properties ----------------------------------------------------------------------------------


@st.composite
def votes(draw: st.DrawFn) -> tuple[int, int]:
    """(k, n) with n large enough for every alpha of ALPHAS."""
    n = draw(st.integers(30, 100_000))
    misses = draw(st.integers(0, n) | st.integers(0, 20))
    return n - misses, n


@UNHURRIED
@given(votes(), ALPHAS)
def test_more_votes_never_shrink_the_radius(pair: tuple[int, int], alpha: float) -> None:
    """At one n, one vote more for the class gives at least the radius."""
    k, n = pair
    more = certify_votes(min(k + 1, n), n, alpha).radius
    assert more is not None
    assert more >= (certify_votes(k, n, alpha).radius or 0.0)


@UNHURRIED
@given(votes(), ALPHAS, st.floats(1.0001, 1000.0))
def test_a_looser_alpha_never_lowers_the_bound(
    pair: tuple[int, int], alpha: float, factor: float
) -> None:
    """At one tally, a larger alpha gives at least the bound."""
    k, n = pair
    looser = min(alpha * factor, 0.5)
    if looser > alpha * 1.00005:
        assert clopper_pearson_lower(k, n, looser) >= clopper_pearson_lower(k, n, alpha)


@UNHURRIED
@given(votes(), ALPHAS)
def test_one_row_more_moves_the_bound_its_own_way(pair: tuple[int, int], alpha: float) -> None:
    """One more row for the class does not lower the bound, one more against it does not raise."""
    k, n = pair
    here = clopper_pearson_lower(k, n, alpha)
    assert clopper_pearson_lower(k + 1, n + 1, alpha) >= here
    assert clopper_pearson_lower(k, n + 1, alpha) <= here


@UNHURRIED
@given(votes(), ALPHAS)
def test_the_bound_stays_below_the_share_seen(pair: tuple[int, int], alpha: float) -> None:
    """A lower bound at alpha <= 1/2 lies in [0, 1) and below the observed share."""
    k, n = pair
    bound = clopper_pearson_lower(k, n, alpha)
    assert 0.0 <= bound < 1.0
    assert bound <= k / n


@UNHURRIED
@given(votes(), ALPHAS, st.floats(1e-12, 0.4))
def test_imperfect_noise_never_helps(pair: tuple[int, int], alpha: float, distance: float) -> None:
    """A positive total variation lowers p_lower by at least itself, down to 0."""
    k, n = pair
    ideal, real = certify_votes(k, n, alpha), certify_votes(k, n, alpha, total_variation=distance)
    assert ideal.p_lower is not None
    assert real.p_lower is not None
    assert real.p_lower <= max(0.0, ideal.p_lower - distance)
    assert (real.radius or 0.0) <= (ideal.radius or 0.0)


@UNHURRIED
@given(
    st.lists(st.integers(0, 3000), min_size=2, max_size=8, unique=True).filter(
        lambda c: max(c) > 9
    ),
    st.randoms(use_true_random=False),
    st.sampled_from([0.05, 0.001]),
    st.sampled_from(METHODS),
)
def test_the_order_of_classes_does_not_matter(
    counts: list[int], random: Any, alpha: float, method: str
) -> None:
    """Permuting the classes permutes the label and changes neither radius nor decision."""
    order = list(range(len(counts)))
    random.shuffle(order)
    shuffled = [counts[old] for old in order]
    if sum(counts) < 11:
        return
    pairs = [
        tuple(certify(votes, votes, 0.5, alpha, method=method) for votes in (counts, shuffled)),
        tuple(predict(votes, alpha) for votes in (counts, shuffled)),
    ]
    for plain, moved in pairs:
        assert (plain.radius, plain.abstained) == (moved.radius, moved.abstained)
        if plain.label is not None:
            assert moved.label is not None
            assert order[moved.label] == plain.label


# --- Ties ----------------------------------------------------------------------------------------


def test_equal_selection_votes_choose_the_lowest_index() -> None:
    """A tie of the selection is broken by index, before any estimation row is looked at."""
    got = certify([0, 50, 50], [0, 1000, 0], 0.5, 0.001)
    other = certify([0, 50, 50], [0, 0, 1000], 0.5, 0.001)
    assert got.label == 1
    assert other.abstained


def test_estimation_votes_never_change_the_class() -> None:
    """A class that wins only the estimation is not certified: that tally may not choose."""
    got = certify([51, 49], [0, 1000], 0.5, 0.001)
    assert (got.label, got.abstained, got.p_lower) == (None, True, 0.0)


@pytest.mark.parametrize("alpha", [1e-9, 0.001, 0.05, 0.5])
def test_equal_top_counts_abstain_in_predict(alpha: float) -> None:
    """Two classes with the same most votes always abstain."""
    assert predict([0, 50, 50], alpha).abstained
    assert predict([40_000, 40_000, 20_000], alpha).abstained


# --- Refusals ------------------------------------------------------------------------------------


def test_smallest_n_of_the_method() -> None:
    """At alpha = 0.001 Cohen's CERTIFY needs 10 rows, the two-sided 11, PREDICT 11 (method.md)."""
    assert smallest_n_certify(0.001, "cohen") == 10
    assert smallest_n_certify(0.001) == 11
    assert smallest_n_predict(0.001) == 11


@pytest.mark.parametrize("alpha", [1e-30, 1e-9, 1e-4, 0.001, 0.05, 0.25, 0.5])
def test_the_smallest_n_answers_and_one_less_is_refused(alpha: float) -> None:
    """A unanimous vote answers at the smallest n that works; one row less is a ValueError."""
    for method in METHODS:
        n = smallest_n_certify(alpha, method)
        assert not certify([1, 0], [n, 0], 1.0, alpha, method=method).abstained
        with pytest.raises(ValueError, match=rf"n = {n - 1} .*smallest n that works is {n}$"):
            certify([1, 0], [n - 1, 0], 1.0, alpha, method=method)
    n = smallest_n_predict(alpha)
    assert not predict([0, n], alpha).abstained
    with pytest.raises(ValueError, match=rf"n = {n - 1} .*smallest n that works is {n}$"):
        predict([0, n - 1], alpha)


@pytest.mark.parametrize(
    ("n0", "n", "sigma", "alpha", "message"),
    [
        (0, 1000, 0.25, 0.001, r"^n0 = 0: the smallest n0 that works is 1$"),
        (100, 10, 0.25, 0.001, r"^n = 10 at alpha = 0.001 .* smallest n that works is 11$"),
        (100, 0, 0.25, 0.001, r"^n = 0 at alpha"),
        (100, 1000, 0.0, 0.001, r"^sigma = 0.0: must be finite and greater than 0$"),
        (100, 1000, float("inf"), 0.001, r"^sigma = inf"),
        (100, 1000, float("nan"), 0.001, r"^sigma = nan"),
        (100, 1000, 0.25, 0.0, r"^alpha = 0.0: must be in \[1e-100, 0.5\]$"),
        (100, 1000, 0.25, 0.51, r"^alpha = 0.51"),
        (
            100,
            1000,
            0.25,
            9e-100,
            r"^alpha = 9e-100: the smallest of its shares is 9e-101, .* 1e-100$",
        ),
        (100, 1000, 0.25, float("nan"), r"^alpha = nan"),
    ],
)
def test_impossible_settings_are_refused_by_name(
    n0: int, n: int, sigma: float, alpha: float, message: str
) -> None:
    """The door and CERTIFY refuse the same settings with the same message."""
    with pytest.raises(ValueError, match=message):
        check_certify(n0, n, sigma, alpha)
    with pytest.raises(ValueError, match=message):
        certify([0, n0], [0, n], sigma, alpha)


@pytest.mark.parametrize(("n", "alpha", "field"), [(10, 0.001, "n"), (100, 0.6, "alpha")])
def test_impossible_predictions_are_refused_by_name(n: int, alpha: float, field: str) -> None:
    """The door and PREDICT refuse the same settings, naming the field."""
    with pytest.raises(ValueError, match=f"^{field} = "):
        check_predict(n, alpha)
    with pytest.raises(ValueError, match=f"^{field} = "):
        predict([0, n], alpha)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([100], "has 1 classes: the smallest number is 2"),
        ([100, -1], "holds -1: the smallest count is 0"),
        ([99.0, 1.0], "must be integers"),
        (np.array([[50, 50]]), "must be integers"),
    ],
)
def test_malformed_counts_are_refused(counts: Any, message: str) -> None:
    """Counts that are not two or more non-negative integers are a ValueError naming them."""
    with pytest.raises(ValueError, match=rf"^counts .*{message}"):
        predict(counts, 0.001)
    with pytest.raises(ValueError, match=rf"^estimation_counts .*{message}"):
        certify([50, 50], counts, 0.5, 0.001)


def test_other_malformed_arguments_are_refused() -> None:
    """Unequal class numbers, a total variation of 1/2 and impossible tallies are ValueErrors."""
    with pytest.raises(ValueError, match="2 classes and estimation_counts 3"):
        certify([0, 100], [0, 0, 100], 0.5, 0.001)
    for distance in (0.5, -1e-9, float("nan")):
        with pytest.raises(ValueError, match=r"^total_variation = "):
            certify_votes(100, 100, 0.001, total_variation=distance)
    for k, n in ((-1, 10), (11, 10), (0, 0)):
        with pytest.raises(ValueError, match=f"^k = {k}, n = {n}"):
            clopper_pearson_lower(k, n, 0.001)


# --- Coverage against the truth ------------------------------------------------------------------


class Setting(NamedTuple):
    """Class 0 where sum(weights * noise) <= threshold, noise in 1/255 steps."""

    weights: tuple[int, ...]
    threshold: int
    sigma: float
    n: int
    alpha: float


SETTINGS = [
    Setting((1,), 40, 0.25, 1000, 0.001),
    Setting((1, 1, 2), 160, 0.25, 10_000, 0.05),
    Setting((1,), 3, 0.5, 100, 0.1),
    Setting((3, 1), 220, 0.12, 100, 0.01),
    Setting((1,), 330, 1.0, 100_000, 0.001),
    Setting((1, 1), 900, 0.5, 10, 0.5),
]
TRIALS = 20_000


def probability_of_class_0(setting: Setting) -> float:
    """P(sum(weights * noise) <= threshold) by convolving the discrete noise (method.md 3)."""
    reach = int(12 * setting.sigma * 255)
    steps = np.arange(-reach, reach + 1)
    # The upper half comes from the lower tail, where float64 keeps relative accuracy.
    edge = norm.cdf((2 * -np.abs(steps) + 1) / (510 * setting.sigma))
    mass = edge - norm.cdf((2 * -np.abs(steps) - 1) / (510 * setting.sigma))
    total = np.ones(1)
    for weight in setting.weights:
        spread = np.zeros(2 * reach * weight + 1)
        spread[::weight] = mass
        total = np.convolve(total, spread)
    middle = len(total) // 2
    return float(1.0 - total[middle + setting.threshold + 1 :].sum())


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.weights == (1,)])
def test_one_pixel_has_the_closed_form_radius(setting: Setting) -> None:
    """One thresholded pixel flips exactly (2T + 1)/510 away, which is sigma * Phi^-1(p)."""
    radius = setting.sigma * norm.ppf(probability_of_class_0(setting))
    assert radius == pytest.approx((2 * setting.threshold + 1) / 510, abs=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_certificates_are_wrong_at_rate_at_most_alpha(setting: Setting) -> None:
    """In 20,000 certifications, radii above the linear classifier's true one keep to alpha."""
    sigma, n, alpha = setting.sigma, setting.n, setting.alpha
    p = probability_of_class_0(setting)
    truth = [max(0.0, sigma * float(norm.ppf(q))) for q in (p, 1.0 - p)]
    random = np.random.default_rng(20_240_718)
    chosen = (random.binomial(100, p, TRIALS) < 50).astype(int)
    votes_0 = random.binomial(n, p, TRIALS)

    @functools.cache
    def fails(label: int, count: int) -> bool:
        votes = [count, n - count]
        got = certify([1 - label, label], votes, sigma, alpha, method="cohen")
        assert got.radius is not None
        return got.radius > truth[label]

    failures = sum(map(fails, chosen.tolist(), votes_0.tolist()))
    assert failures <= binom.ppf(1 - 1e-6, TRIALS, alpha)
    if n == 10_000:
        # Here the tally is fine-grained enough for a sharp bound to use up most of its alpha.
        assert failures >= 0.5 * alpha * TRIALS
