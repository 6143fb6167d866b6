"""models/evaluation/logs/reading.py: what a log's line is, and what is refused by name."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from models.evaluation.logs.reading import HEADER, Answer, Line, has_radii, read_answers, read_log
from models.evaluation.records import Record


def written(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    (tmp_path / "log.tsv").write_text(header + "".join(f"{line}\n" for line in lines))
    return tmp_path / "log.tsv"


def test_lines_keep_their_printed_radius(tmp_path: Path) -> None:
    """A label may be wrong and still certified; digits are those of the file."""
    log = written(tmp_path, "0\t3\t3\t0.480\t1\t0:00:14.17", "7\t3\t4\t1.2e-05\t0\t1.0",
                  "9\t3\t-1\t0.0\t0\t1.0")  # fmt: skip
    first, second, third = read_log(log)
    assert first == Line(0, 3, 3, None, pytest.approx(14.17), Decimal("0.480"))
    assert (second.index, second.certified, second.correct) == (7, True, False)
    assert float(second.radius) == 1.2e-05
    assert (third.certified, third.correct) == (False, False)


def test_an_evaluation_s_log_is_read(tmp_path: Path) -> None:
    """The lines that `evaluate` writes are a log."""
    record = Record(4, "a", 1, 1, 0.4567894, {1: 10}, None, 0.5, "b")
    assert read_log(written(tmp_path, record.line().strip())) == [
        Line(4, 1, 1, None, 0.5, Decimal("0.456789"))
    ]


def test_attacked_images_have_no_radius(tmp_path: Path) -> None:
    """Their log has the label without noise instead; certified answers are answers, too."""
    header = "idx\tlabel\tpredict\tbase\tnorm\tcorrect\ttime\n"
    log = written(tmp_path, "0\t3\t-1\t3\t0.5\t0\t0:01:02.5", header=header)
    assert read_answers(log) == [Answer(0, 3, -1, 3, 62.5)]
    assert not has_radii(log)
    with pytest.raises(ValueError, match="no column 'radius'"):
        read_log(log)
    certified = written(tmp_path, "0\t3\t3\t0.5\t1\t2")
    assert read_answers(certified) == [Answer(0, 3, 3, None, 2.0)]
    assert has_radii(certified)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0\t3\t3\tx\t1\t1", "line 2: radius = 'x': must be finite and at least 0"),
        ("0\t3\t3\tnan\t1\t1", "radius = 'nan'"),
        ("0\t3\t3\t-0.1\t1\t1", "radius = '-0.1'"),
        ("0\t3\t3\t0.1\t0\t1", "correct = '0': must be 1"),
        ("0\t3\t3\t0.1\t1\tlong", "time = 'long': must be seconds, or H:MM:SS"),
        ("0\t3\t-1\t0.1\t0\t1", "radius = '0.1': must be 0 where predict is -1"),
        ("0\t3\t-2\t0.1\t0\t1", "predict = '-2'"),
        ("0\t3\tcat\t0.1\t0\t1", "predict = 'cat': must be an integer"),
        ("0\t3", "predict = None: must be an integer"),
        ("0\t3\t3\t0.1\t1\t1\n0\t3\t3\t0.1\t1\t1", "idx = 0 occurs twice"),
    ],
)
def test_a_bad_line_is_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    """The message has the file, the field and the value."""
    with pytest.raises(ValueError, match=r"log\.tsv") as error:
        read_log(written(tmp_path, line))
    assert message in str(error.value)


def test_files_that_are_no_logs_are_refused(tmp_path: Path) -> None:
    """Another header, no line, no text."""
    with pytest.raises(ValueError, match="no column 'predict'"):
        read_log(written(tmp_path, "0\t3", header="idx\tlabel\n"))
    with pytest.raises(ValueError, match="has no images"):
        read_log(written(tmp_path))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no text"):
        read_log(tmp_path / "bytes")
