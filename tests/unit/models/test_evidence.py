"""models/certificates/evidence.py: what counts prove, recomputed from a document's sections."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.certificates.alpha import alpha_shares
from models.certificates.anytime import Anytime, certify_anytime
from models.certificates.evidence import looks_of, recompute, sparse
from models.certificates.rules import certify

COUNTS = st.lists(st.integers(0, 400), min_size=3, max_size=3).filter(
    lambda votes: sum(votes) >= 10
)


def question(**fields: Any) -> dict[str, Any]:
    asked = {"sigma": 0.5, "alpha": 0.001, "n0": 10, "n": 1000, "method": "cohen"}
    asked |= {"target_radius": None, "looks": None} | fields
    return {"alpha_shares": {"label": asked["alpha"]}} | asked


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
        proven = certify(selection, estimation, 0.5, alpha, method="cohen", total_variation=1e-12)
    except ValueError:  # These could only abstain.
        with pytest.raises(ValueError, match="can only ever abstain"):
            recompute(asked, votes, 3)
        return
    assert recompute(asked, votes, 3) == proven


@pytest.mark.parametrize(
    ("asked", "votes", "why"),
    [
        ({"alpha_shares": {"label": 0.01}}, {}, "alpha_shares"),
        ({"alpha_shares": {}}, {}, "alpha_shares"),
        ({"method": "binomial"}, {}, "method = binomial"),
        ({"target_radius": 0.5}, {}, "target_radius = 0.5: cohen has none"),
        ({"looks": [32]}, {}, "looks = .* cohen has none"),
        ({"looks": []}, {}, "looks = .* cohen has none"),
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


EARLY: dict[str, Any] = {
    "method": "anytime", "n": 200, "looks": [32, 96, 200], "target_radius": 0.05
}  # fmt: skip
LOOKS = [[32, 30, 2], [96, 90, 4]]
COUNTS_THEN = {"0": 4, "1": 90, "2": 2}


def early(**fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Question and evidence of rows that ended at the second of three looks."""
    asked = question(**EARLY)
    asked["alpha_shares"] = alpha_shares("anytime", asked["alpha"], with_target=True)
    votes = evidence(estimation_counts=COUNTS_THEN, looks=LOOKS)
    return asked | fields.pop("asked", {}), votes | fields


def test_rows_that_ended_early_prove_what_they_proved() -> None:
    """The looks of a certificate suffice, though they leave out most counts."""
    asked, votes = early()
    proven = certify_anytime(
        Anytime(0.5, 0.001, 10, 200, 0.05, (32, 96, 200), 1e-12),
        [0, 10, 0],
        [[1, 30, 1], [4, 90, 2]],
    )
    assert proven.target_reached
    assert recompute(asked, votes, 3) == proven
    assert looks_of(1, [[2, 30, 0], [4, 90, 2]]) == LOOKS


@pytest.mark.parametrize(
    "fields",
    [
        {"looks": []},
        {"looks": LOOKS[:1]},
        {"looks": [[32, 30, 2], [96, 91, 4]]},
        {"looks": [[32, 30, 2], [96, 90, 5]]},
        {"looks": [[33, 30, 2], [96, 90, 4]]},
        {"looks": [[32, 91, 2], [96, 90, 4]]},
        {"looks": [[32, 20, 12], [96, 90, 4]]},
        {"looks": [[32, 30, 3], [96, 90, 4]]},
        {"looks": [[32, -1, 2], [96, 90, 4]]},
        {"looks": [[32, 40, 0], [96, 90, 4]]},
        {"looks": [[32, 32, 1], [96, 90, 4]]},
        {"looks": [[32, 27, 2], [96, 90, 4]]},
        {"looks": [[32, 27, 1], [96, 90, 4]]},
        {"looks": [[32, 27, 2], [96, 90, 6]], "estimation_counts": {"0": 6, "1": 90}},
        {"looks": [[32, 28, 1], [96, 92, 4]], "estimation_counts": {"0": 4, "1": 92}},
        {"asked": {"looks": None}},
        {"asked": {"looks": [32, 96]}},
        {"asked": {"looks": [32, 32, 200]}},
        {"asked": {"target_radius": None}},
    ],
)
def test_looks_that_do_not_fit_are_refused(fields: dict[str, Any]) -> None:
    """Looks outside the schedule, votes taken back, and a last look of other counts."""
    asked, votes = early(**fields)
    with pytest.raises(
        ValueError, match=r"looks = |alpha_shares = |estimation_counts sum to 96: must be 32"
    ):
        recompute(asked, votes, 3)
