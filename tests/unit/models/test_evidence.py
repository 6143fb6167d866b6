"""models/evidence.py: what counts prove, recomputed from a document's sections."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.certificates import certify
from models.evidence import norms, recompute, sparse

COUNTS = st.lists(st.integers(0, 400), min_size=3, max_size=3).filter(
    lambda votes: sum(votes) >= 10
)


def question(**fields: Any) -> dict[str, Any]:
    asked = {"sigma": 0.5, "alpha": 0.001, "n0": 10, "n": 1000, "method": "cohen"}
    asked |= {"target_radius": None, "looks": None} | fields
    return {"alpha_shares": {"p_lower": asked["alpha"]}} | asked


def evidence(**fields: Any) -> dict[str, Any]:
    votes = {"selection_counts": {"1": 10}, "estimation_counts": {"0": 30, "1": 970}}
    return votes | {"looks": [], "total_variation": 1e-12} | fields


@given(selection=COUNTS, estimation=COUNTS, alpha=st.floats(1e-6, 0.4))
def test_recomputing_is_certifying(
    selection: list[int], estimation: list[int], alpha: float
) -> None:
    """The sections of any certificate prove what its votes proved."""
    asked = question(alpha=alpha, n0=sum(selection), n=sum(estimation))
    votes = evidence(
        selection_counts=sparse(tuple(selection)), estimation_counts=sparse(tuple(estimation))
    )
    try:
        proven = certify(selection, estimation, 0.5, alpha, total_variation=1e-12)
    except ValueError:  # These could only abstain.
        with pytest.raises(ValueError, match="can only ever abstain"):
            recompute(asked, votes, 3)
        return
    assert recompute(asked, votes, 3) == proven


@pytest.mark.parametrize(
    ("asked", "votes", "why"),
    [
        ({"alpha_shares": {"p_lower": 0.01}}, {}, "alpha_shares"),
        ({"alpha_shares": {}}, {}, "alpha_shares"),
        ({"method": "binomial"}, {}, "method = 'binomial'"),
        ({"target_radius": 0.5}, {}, "target_radius = 0.5: cohen has none"),
        ({"looks": [32]}, {}, "looks = .* cohen has none"),
        ({}, {"looks": [[32, 32, 0]]}, "looks = .* cohen has none"),
        ({"n": 1001}, {}, "estimation_counts sum to 1000: must be 1001"),
        ({"n0": 9}, {}, "selection_counts sum to 10: must be 9"),
        ({}, {"selection_counts": {"3": 10}}, "the key '3': must be a label index below 3"),
        ({}, {"selection_counts": {"01": 10}}, "the key '01'"),
        ({}, {"selection_counts": {"-1": 10}}, "the key '-1'"),
        ({}, {"selection_counts": {"²": 10}}, "selection_counts has the key"),
        ({}, {"selection_counts": {"1": 11, "2": -1}}, "-1 votes for label 2"),
        ({}, {"selection_counts": {"1": 10, "2": 0}}, "0 votes for label 2"),
        ({}, {"total_variation": -1.0}, "total_variation"),
        ({"sigma": 0.0}, {}, "sigma"),
    ],
)
def test_evidence_that_does_not_fit_is_refused(
    asked: dict[str, Any], votes: dict[str, Any], why: str
) -> None:
    """The field, its value and the limit are named."""
    with pytest.raises(ValueError, match=why):
        recompute(question(**asked), evidence(**votes), 3)


@given(radius=st.floats(1e-6, 10), side=st.integers(1, 512))
def test_no_norm_is_rounded_up(radius: float, side: int) -> None:
    """Every stated ball lies inside the certified one, by at most a millionth of a millionth."""
    found = norms(radius, (3, side, side))
    assert found["l1"] == found["l2"] == radius
    exact = radius / math.sqrt(3 * side * side)
    assert exact * (1 - 1e-12) <= found["linf"] < exact
