"""models/evaluation/paper/sources.py: names of logs, and the rules of their radii."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.certificates.rules import certify
from models.evaluation.paper.sources import read_logs
from models.evaluation.records import Record, RecordFile
from tests.support.logs import write_log

SETTINGS = {"sigma": 0.25, "alpha": 0.001, "classes": 3, "method": "two-sided", "resolution": 32}


def counted(folder: Path, selection: dict[int, int] | None) -> Path:
    """A log of `evaluate` with the votes of one image of label 1."""
    with RecordFile(folder / "ours-0.25", SETTINGS) as kept:
        kept.add(Record(0, "a", 1, 1, 0.4, {1: 900, 0: 60, 2: 40}, selection, 1.0, "b"))
    return folder / "ours-0.25.tsv"


def test_names_come_from_folders_and_files(tmp_path: Path) -> None:
    """A folder names all its logs; a leading data set is dropped; a name may be given."""
    folder = tmp_path / "stl10"
    folder.mkdir()
    for stem in ("stl10-ours-0.25", "none-0.5"):
        write_log(folder / f"{stem}.tsv", [0, 1], 1000, 0.25)
    assert set(read_logs([str(folder)])) == {"stl10/ours-0.25", "stl10/none-0.5"}
    assert set(read_logs([str(folder / "none-0.5.tsv")])) == {"stl10/none-0.5"}
    given = read_logs([f"pets/ours-0.5={folder / 'none-0.5.tsv'}", str(folder)])
    assert set(given) == {"pets/ours-0.5", "stl10/ours-0.25", "stl10/none-0.5"}


def test_names_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    """No log in a folder, a name of one part, one name twice, no file."""
    log = write_log(tmp_path / "ours-0.25.tsv", [0], 1000, 0.25)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder has no \.tsv"):
        read_logs([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="the name 'ours' must be DATASET/RUN"):
        read_logs([f"ours={log}"])
    with pytest.raises(ValueError, match="are both a/b"):
        read_logs([f"a/b={log}", f"a/b={log}"])
    with pytest.raises(FileNotFoundError):
        read_logs([f"a/b={tmp_path / 'no.tsv'}"])


def test_votes_are_certified_by_both_rules(tmp_path: Path) -> None:
    """With the counts beside a log, its radii are those of `certify`, not those printed."""
    (log,) = read_logs([f"a/b={counted(tmp_path, {1: 90, 0: 10})}"]).values()
    for rule in ("cohen", "two-sided"):
        exact = certify([10, 90, 0], [60, 900, 40], 0.25, 0.001, method=rule)
        (record,) = log.certified[rule].records
        assert record.radius == pytest.approx(exact.radius, abs=1e-9)
        assert record.correct
    assert log.certified["two-sided"].records[0].radius > log.certified["cohen"].records[0].radius


def test_without_selection_votes_the_rule_is_the_run_s(tmp_path: Path) -> None:
    """A server returns none, so its radii are not taken for Cohen's."""
    (log,) = read_logs([f"a/b={counted(tmp_path, None)}"]).values()
    assert set(log.certified) == {"two-sided"}
    assert log.certified["two-sided"].records[0].radius == 0.4


def test_a_run_without_noise_certifies_nothing(tmp_path: Path) -> None:
    """The undefended baseline has answers, and no radius at which they hold."""
    with RecordFile(tmp_path / "undefended", {"task": "default"}) as kept:
        kept.add(Record(0, "a", 1, 1, 0.0, {1: 1}, None, 1.0, "b"))
    (log,) = read_logs([f"a/undefended={tmp_path / 'undefended.tsv'}"]).values()
    assert log.certified == {}
    assert log.answers[0].correct


def test_a_log_alone_counts_as_cohen_s(tmp_path: Path) -> None:
    """Its printed radii are taken as they are; an attack's log has none."""
    log = write_log(tmp_path / "log.tsv", [0, 600], 1000, 0.25)
    attacked = tmp_path / "attacked.tsv"
    attacked.write_text("idx\tlabel\tpredict\tbase\tnorm\tcorrect\ttime\n0\t1\t1\t1\t0.5\t1\t2\n")
    found = read_logs([f"a/b={log}", f"a/c={attacked}"])
    assert [r.radius for r in found["a/b"].certified["cohen"].records] == [0.616, 0.0]
    assert found["a/c"].certified == {}
    assert found["a/c"].answers[0].correct


def test_a_damaged_file_of_counts_is_refused(tmp_path: Path) -> None:
    """It is named."""
    counted(tmp_path, None)
    with (tmp_path / "ours-0.25.counts.jsonl").open("a") as file:
        file.write('{"index": 1}\n')
    with pytest.raises(ValueError, match=r"ours-0\.25\.counts\.jsonl: is no file of counts"):
        read_logs([f"a/b={tmp_path / 'ours-0.25.tsv'}"])
