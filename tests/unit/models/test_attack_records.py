"""Records of attacked images, and what their figures say."""

from __future__ import annotations

from pathlib import Path

from models.evaluation.attacks.records import AttackRecord, attack_figures, clean_figures
from models.evaluation.records import OutcomeFile, Record
from models.evaluation.results import Run


def certified(index: int, predict: int, radius: float) -> Record:
    votes = {0: 90, 1: 10}
    return Record(index, f"image {index}", 0, predict, radius, votes, votes, 1.0, "bundle")


def attacked(index: int, predict: int, base: int = 1, norm: float = 0.5) -> AttackRecord:
    return AttackRecord(index, f"image {index}", 0, predict, base, norm, {0: 7, 1: 3}, 2.0)


def test_figures_of_known_outcomes() -> None:
    """A right answer, an abstention and two wrong ones; a certificate that the last contradicts,
    and one whose radius ends before the attack."""
    run = Run("run", {}, [certified(0, 0, 0.6), certified(1, 0, 0.9), certified(2, 0, 0.4),
                          certified(3, 0, 0.7)])  # fmt: skip
    outcomes = [attacked(0, 0), attacked(1, -1), attacked(2, 1), attacked(3, 1)]
    found = attack_figures(run, outcomes, 0.5)
    counts = {name: found[name]["count"] for name in ("robust", "abstained", "misled", "certified")}
    assert counts == {"robust": 1, "abstained": 1, "misled": 2, "certified": 3}
    assert found["contradicted"] == [3]
    assert (found["mean norm"], found["seconds"]) == (0.5, 8.0)
    undefended = attack_figures(Run("head", {}, [], certifies=False), outcomes, 0.5)
    assert {"certified", "contradicted"}.isdisjoint(undefended)


def test_the_classifier_decides_where_predict_abstains() -> None:
    """The empirical clean figure takes the undenoised label on abstention, and only then."""
    clean = [attacked(0, 0, base=1), attacked(1, -1, base=0), attacked(2, -1, base=1),
             attacked(3, 1, base=0)]  # fmt: skip
    found = clean_figures(clean)
    assert found["predict"]["count"] == 1
    assert found["empirical clean"]["count"] == 2


def test_records_are_kept_in_a_file(tmp_path: Path) -> None:
    """They come back as they were; the log has their columns, the norm rounded up."""
    outcome = attacked(4, -1, norm=0.12345678)
    with OutcomeFile(AttackRecord, tmp_path / "run", {"eps": 0.5}) as kept:
        kept.add(outcome)
    again = OutcomeFile(AttackRecord, tmp_path / "run", {"eps": 0.5})
    assert again.sorted() == [outcome]
    assert (tmp_path / "run.tsv").read_text().splitlines() == [
        "idx\tlabel\tpredict\tbase\tnorm\tcorrect\ttime",
        "4\t0\t-1\t1\t0.123457\t0\t2.000",
    ]
