"""models/evaluation/records.py: logs in the field's columns, and counts that survive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.evaluation.records import Record, RecordFile

SETTINGS = {"sigma": 0.25, "n": 20}


def record(index: int, predict: int = 1, radius: float = 0.1234567) -> Record:
    return Record(index, f"{index}.png", 1, predict, radius, {1: 18, 4: 2}, {1: 5}, 0.25, "b" * 8)


def kept(path: Path) -> list[int]:
    return list(RecordFile(path, SETTINGS).records)


def test_the_log_has_cohens_columns_in_order(tmp_path: Path) -> None:
    """Lines are sorted by index, -1 is an abstention, and a radius is rounded down."""
    with RecordFile(tmp_path / "run", SETTINGS) as file:
        for each in (record(7), record(2, predict=-1, radius=0.0)):
            file.add(each)
    assert (tmp_path / "run.tsv").read_text() == (
        "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
        "2\t1\t-1\t0.000000\t0\t0.250\n"
        "7\t1\t1\t0.123456\t1\t0.250\n"
    )


def test_a_cut_line_is_computed_again(tmp_path: Path) -> None:
    """A kill in the middle of a line loses that image alone, and records come back as they were."""
    path = tmp_path / "run"
    with RecordFile(path, SETTINGS) as file:
        file.add(record(0))
        file.add(record(1))
        whole = dict(file.records)
    counts = tmp_path / "run.counts.jsonl"
    text = counts.read_text()
    counts.write_text(text[: text.rindex("estimation")])
    assert kept(path) == [0]
    assert (tmp_path / "run.tsv").read_text().count("\n") == 2
    with RecordFile(path, SETTINGS) as file:
        assert file.records == {0: whole[0]}
        file.add(record(1))
    assert RecordFile(path, SETTINGS).records == whole


def test_an_error_keeps_what_there_is(tmp_path: Path) -> None:
    """Records added before an exception are read afterwards."""
    file = RecordFile(tmp_path / "run", SETTINGS)

    def broken() -> None:
        with file:
            file.add(record(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert kept(tmp_path / "run") == [3]


def test_another_setting_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    """The message names the file, the setting and both values."""
    with RecordFile(tmp_path / "run", SETTINGS) as file:
        file.add(record(3))
    before = (tmp_path / "run.counts.jsonl").read_text()
    with pytest.raises(ValueError, match=r"jsonl has n = 20, and the run has 30: choose another"):
        RecordFile(tmp_path / "run", SETTINGS | {"n": 30})
    assert (tmp_path / "run.counts.jsonl").read_text() == before


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"index": 1}'])
def test_another_file_is_refused(tmp_path: Path, line: str) -> None:
    """A line that is no record is named with its file."""
    (tmp_path / "run.counts.jsonl").write_text(f'{{"sigma": 0.25, "n": 20}}\n{line}\n')
    with pytest.raises(ValueError, match=r"run\.counts\.jsonl: is no file of counts"):
        RecordFile(tmp_path / "run", SETTINGS)


def test_the_majority_needs_no_certificate() -> None:
    """The most frequent label counts, the lowest of equals, though the image abstains."""
    abstained = Record(0, "a", 1, -1, 0.0, {4: 5, 1: 5, 0: 2}, None, 0.1, "")
    assert abstained.majority == 1
    assert not abstained.correct
