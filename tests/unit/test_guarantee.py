"""docs/guarantee.md: its examples have the code's figures, to the digits shown."""

from __future__ import annotations

import math
import re

import pytest
from scipy.special import ndtri

from models.certificates.alpha import alpha_shares
from models.certificates.bounds import clopper_pearson_upper
from models.certificates.evidence import total_variation
from models.certificates.norms import attack_norms
from models.certificates.rules import Certificate, certify
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "guarantee.md").read_text()
SHAPE, SIGMA, ALPHA, N = (3, 32, 32), 0.25, 0.001, 1000


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


EXAMPLE = " ".join(section("An example for a pocket calculator").split())


def proven(*votes: int, method: str = "two-sided", sigma: float = SIGMA) -> Certificate:
    selection = [1] + [0] * (len(votes) - 1)
    blur = total_variation(SHAPE, sigma)
    return certify(selection, votes, sigma, ALPHA, method=method, total_variation=blur)


def cut(value: float, digits: int = 4) -> str:
    """The number with its further digits cut off, as a radius is shown."""
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"


def test_the_setting() -> None:
    """Shares of alpha and total variation are the method's."""
    shares = alpha_shares("two-sided", ALPHA)
    assert f"{shares['label']:.4f} for the label and {shares['runner_up']:.4f} for the" in EXAMPLE
    assert total_variation(SHAPE, SIGMA) < 1e-12
    assert "below 1e-12" in EXAMPLE


def test_all_votes_agree() -> None:
    """The closed form, the table's entries, the radius and its gray levels."""
    got, share = proven(N, 0), 0.0009
    p_lower, p_upper, radius = got.p_lower or 0.0, got.p_upper or 0.0, got.radius or 0.0
    assert f"0.0009^(1/1000) = exp({math.log(share):.4f} / 1000) = {p_lower:.6f}" in EXAMPLE
    assert share ** (1 / N) == pytest.approx(p_lower, abs=1e-11)
    assert f"1 - {p_lower:.6f} = {p_upper:.6f}" in EXAMPLE
    none = clopper_pearson_upper(0, N, 0.0001)
    assert f"1 - 0.0001^(1/1000) = {none:.6f}" in EXAMPLE
    assert none > p_upper
    z = f"{ndtri(p_lower):.4f}"
    assert f"z = {z} and -{z}" in EXAMPLE
    for entry, quantile in re.findall(r"(0\.\d{5}) at (2\.\d\d)", EXAMPLE):
        assert f"{0.5 * math.erfc(-float(quantile) / math.sqrt(2)):.5f}" == entry
    assert f"radius = 0.25/2 x ({z} + {z}) = {cut(radius)}" in EXAMPLE
    levels = attack_norms(radius, SHAPE)
    one, each = levels["l2_gray_levels"], levels["linf_gray_levels"]
    assert isinstance(one, float)
    assert isinstance(each, float)
    assert f"255 x {cut(radius)} = {cut(one, 1)}: one value may move by {int(one)} " in EXAMPLE
    assert f"{cut(one, 1)} / sqrt({math.prod(SHAPE)}) = {cut(each, 2)}." in EXAMPLE
    larger = attack_norms(radius, (3, 224, 224))["linf_gray_levels"]
    assert isinstance(larger, float)
    distance = " ".join(section("What is certified").split())
    assert f"For r = {cut(radius)} at 224 x 224 that is {cut(larger, 2)} of" in distance


def test_one_vote_differs() -> None:
    """The bound put into the binomial tail gives the label's share of alpha."""
    got = proven(N - 1, 1)
    p = round(got.p_lower or 0.0, 7)
    assert f"`p_lower` is {p}." in EXAMPLE
    terms = p**N, N * p ** (N - 1) * (1 - p)
    assert f"{p}^1000 + 1000 x {p}^999 x {1 - p:.7f}" in EXAMPLE
    assert f" = {terms[0]:.7f} + {terms[1]:.7f} = {round(sum(terms), 7)} " in EXAMPLE
    z = f"{ndtri(got.p_lower):.4f}"
    assert f"radius = 0.25/2 x ({z} + {z}) = {cut(got.radius or 0.0)}" in EXAMPLE


def test_a_runner_up() -> None:
    """Both quantiles give the two-sided radius, which is larger than the published rule's."""
    got, cohen = proven(900, 50, 50), proven(900, 50, 50, method="cohen")
    assert f"`p_lower` {got.p_lower:.6f} and `p_upper` {got.p_upper:.6f}" in EXAMPLE
    z = ndtri(got.p_lower), -ndtri(got.p_upper)
    assert f"({z[0]:.4f} + {z[1]:.4f}) = {cut(got.radius or 0.0)}" in EXAMPLE
    assert f"(`cohen`: {cut(cohen.radius or 0.0)})" in EXAMPLE


def test_the_table_of_both_rules() -> None:
    """Each line has the radii in units of sigma that both rules prove, cut after three digits."""
    lines = re.findall(
        r"^\| ([\d,]+) \| (\d+) \| ([\d.]+|abstains) \| ([\d.]+) \|$",
        section("From votes to a radius"),
        re.MULTILINE,
    )
    assert len(lines) == 4
    for label, other, *shown in lines:
        k, m = int(label.replace(",", "")), int(other)
        parts = [m] * ((N - k) // m) if m else [0]
        radii = [
            proven(k, *parts, method=method, sigma=1.0).radius for method in ("cohen", "two-sided")
        ]
        assert shown == [cut(radius, 3) if radius else "abstains" for radius in radii]
