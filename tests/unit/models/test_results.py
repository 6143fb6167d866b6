"""models/evaluation/results.py: figures by hand, other rules from the same votes, the curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.certificates.rules import certify
from models.evaluation.pictures.curves import draw, draw_panels
from models.evaluation.records import Record
from models.evaluation.results import Run, by_rule, compared, curve, figures

SETTINGS = {"task": "t", "sigma": 0.25, "alpha": 0.001, "classes": 3, "method": "two-sided"}


def record(
    index: int, predict: int, radius: float, votes: dict[int, int], truth: int = 1
) -> Record:
    return Record(index, str(index), truth, predict, radius, votes, {1: 10}, 1.5, "b")


RUN = Run(
    "t",
    SETTINGS,
    [
        record(0, 1, 0.6, {1: 100}),
        record(1, 1, 0.3, {1: 90, 0: 10}),
        record(2, -1, 0.0, {1: 55, 2: 45}),
        record(3, 2, 0.5, {2: 100}),
    ],
)


def test_figures_by_hand() -> None:
    """Abstentions and wrong labels are certified nowhere; clean counts the majority."""
    found = figures(RUN)
    assert found["images"] == 4
    assert (found["clean"]["count"], found["clean"]["value"]) == (3, 0.75)
    shares = {epsilon: share["value"] for epsilon, share in found["certified"].items()}
    assert shares == {"0": 0.5, "0.25": 0.5, "0.5": 0.25, "0.75": 0, "1": 0, "1.25": 0}
    assert found["ACR"]["value"] == pytest.approx((0.6 + 0.3) / 4)
    assert found["abstentions"]["count"] == 1
    assert found["one noisy row"] == pytest.approx((1 + 0.9 + 0.55 + 0) / 4, abs=1e-4)
    assert found["p_A"]["50%"] == 0.95
    assert (found["rows"], found["seconds"]) == (400, 6.0)
    assert found["clean"]["low"] < 0.75 < found["clean"]["high"]


def test_a_run_without_noise_has_no_certificates() -> None:
    """The undefended baseline is clean accuracy alone, and is compared by it alone."""
    bare = Run("u", {"task": "t"}, [record(i, 1, 0.0, {1: 1}) for i in range(4)], certifies=False)
    assert "certified" not in figures(bare)
    assert figures(bare)["clean"]["value"] == 1.0
    assert set(compared(RUN, bare)) == {"before", "after", "clean"}
    assert compared(RUN, bare)["clean"]["value"] == 0.25


def test_comparisons_are_paired() -> None:
    """A run differs from itself by exactly nothing; a constant gain has no width."""
    same = compared(RUN, RUN)
    assert all(same[name] == {"value": 0, "low": 0, "high": 0} for name in ("clean", "ACR"))
    right = [record(i, 1, 0.5, {1: 100}) for i in range(4)]
    wider = [record(i, 1, 0.75, {1: 100}) for i in range(4)]
    gain = compared(Run("a", SETTINGS, right), Run("b", SETTINGS, wider))
    assert gain["ACR"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert gain["certified at 0.75"]["value"] == 1.0


def test_another_rule_is_applied_to_the_same_votes() -> None:
    """Labels and radii are those of `certify`; without selection votes there are none."""
    run = Run("t", SETTINGS, [record(0, 1, 0.6, {1: 900, 0: 100})])
    other = by_rule(run, "cohen", 1e-12)
    assert other is not None
    expected = certify([0, 10, 0], [100, 900, 0], 0.25, 0.001, method="cohen",
                       total_variation=1e-12)  # fmt: skip
    assert other.records[0].radius == expected.radius
    assert other.settings["method"] == "cohen"
    unselected = Record(0, "0", 1, 1, 0.6, {1: 100}, None, 1.0, "b")
    assert by_rule(Run("t", SETTINGS, [unselected]), "cohen", 0.0) is None


def test_the_curve_is_the_certified_accuracy_at_each_radius() -> None:
    """It falls at the right images' radii only, and a radius counts at itself."""
    assert curve(RUN) == ([0.0, 0.3, 0.6], [0.5, 0.5, 0.25])


def test_the_curve_is_drawn_twice(tmp_path: Path) -> None:
    """As PNG and SVG, the same bytes each time; a run without noise is a point."""
    bare = Run("u", {}, [record(0, 1, 0.0, {1: 1})], certifies=False)
    files = draw([RUN, bare], tmp_path / "curve")
    first = [file.read_bytes() for file in files]
    assert [file.name for file in files] == ["curve.png", "curve.svg"]
    assert first[0].startswith(b"\x89PNG")
    assert b"<svg" in first[1]
    assert [file.read_bytes() for file in draw([RUN, bare], tmp_path / "curve")] == first


def test_panels_leave_out_what_is_missing(tmp_path: Path) -> None:
    """A missing point changes the picture, a missing line draws nothing, and bytes repeat."""
    series = {"ACR": {"a": [0.1, 0.2, 0.3], "b": [None] * 3}}
    whole = draw_panels([0, 1, 2], series, "k", tmp_path / "whole")
    gap = draw_panels([0, 1, 2], {"ACR": {"a": [0.1, None, 0.3]}}, "k", tmp_path / "gap")
    alone = draw_panels([0, 1, 2], {"ACR": {"a": [0.1, 0.2, 0.3]}}, "k", tmp_path / "alone")
    assert [file.name for file in gap] == ["gap.png", "gap.svg"]
    assert whole[1].read_bytes() == alone[1].read_bytes() != gap[1].read_bytes()
    assert b">b<" not in whole[1].read_bytes()
