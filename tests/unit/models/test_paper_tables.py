"""models/evaluation/paper: figures by hand, tables as laid out, three formats, published rows."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path

import pytest

from models.evaluation.logs.reading import Answer
from models.evaluation.paper import layout
from models.evaluation.paper.figures import MEASURES, Figure, average, measured
from models.evaluation.paper.layout import TABLES, Table, ablations, filled_table, used_logs
from models.evaluation.paper.rendering import comma_separated, latex, markdown
from models.evaluation.paper.sources import Log, read_logs
from models.evaluation.records import Record
from models.evaluation.results import Run
from models.evaluation.scores import wilson_interval
from tests.support.logs import CIFAR, IMAGENET, published


def certified(*radii: float, rules: tuple[str, ...] = ("cohen",)) -> Log:
    """A log of images whose label is right where the radius is positive."""
    records = [
        Record(i, "", 1, 1 if radius > 0 else -1, radius, {}, None, 1.0, "")
        for i, radius in enumerate(radii)
    ]
    answers = [Answer(r.index, 1, r.predict, None, 1.0) for r in records]
    return Log(answers, {rule: Run("", {}, records) for rule in rules})


ATTACKED = Log(
    [Answer(0, 1, 1, 1, 9.0), Answer(1, 1, -1, 1, 1.0), Answer(2, 1, -1, 0, 3.0),
     Answer(3, 1, 0, 1, 2.0)],
    {},
)  # fmt: skip


def row(table: Table, *heads: str, part: int = 0) -> list[str]:
    (found,) = [row for row in table.parts[part].rows if row.heads == heads]
    return [cell.text() for cell in found.cells]


def test_printed_rows_stand_in_for_missing_logs() -> None:
    """Rows that no command makes show the paper's figures, until a log takes their place."""
    assert not any(filled_table(name, {}).filled for name in TABLES)
    assert row(filled_table("table-03", {}), "Mao et al.", "×, as printed") == [  # noqa: RUF001
        "26.0", "12.3", "51.2", "47.2"
    ]  # fmt: skip
    for part in range(2):
        values = row(filled_table("table-01", {}), "0.5", "Mao et al., as printed", part=part)
        mean = sum(map(float, values[:-1])) / 8
        assert float(values[-1]) == pytest.approx(mean, abs=0.06)
    measured_one = filled_table("table-03", {"imagenet/mao-0.5-pgd-0.5": ATTACKED})
    assert row(measured_one, "Mao et al.", "×")[0].startswith("25.0 [")  # noqa: RUF001
    assert ",printed," not in comma_separated(measured_one)


# --- Figures -------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    """Shares, ACR, empirical accuracy and seconds of small logs."""
    log = certified(0.5, 0.25, 0.0, 0.75)
    assert measured("certified 0.5", log) == Figure(0.5, *wilson_interval(2, 4), 4, "share")
    assert measured("certified 0", log) == Figure(0.75, *wilson_interval(3, 4), 4, "share")
    acr = measured("ACR", log)
    assert acr is not None
    assert (acr.value, acr.text()) == (0.375, "0.375")
    for name, value in (("correct", 0.25), ("empirical", 0.5), ("seconds", 2.0)):
        found = measured(name, ATTACKED)
        assert found is not None
        assert found.value == value
    assert measured("seconds", ATTACKED).text() == "2.00 ± 0.82"  # type: ignore[union-attr]


def test_what_is_missing_has_no_figure() -> None:
    """No log, no radii, no votes for the rule; an unknown figure is refused."""
    assert measured("ACR", None) is None
    assert measured("ACR", ATTACKED) is None
    assert measured("certified 0", certified(0.5), "two-sided") is None
    with pytest.raises(ValueError, match="figure = 'speed': must be one of certified, ACR"):
        measured("speed", ATTACKED)


def test_an_average_needs_every_data_set() -> None:
    """Data sets count alike, whatever their size is."""
    one, other = Figure(0.2, 0, 1, 10, "share"), Figure(0.6, 0, 1, 1000, "share")
    found = average([one, other])
    assert found is not None
    assert found.text() == "40.0"
    assert average([one, None]) is None


# --- Layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_laid_out(name: str) -> None:
    """Each has a caption and cells, and without logs every cell is blank."""
    table = filled_table(name, {})
    assert table.caption
    assert not table.filled
    for part in table.parts:
        assert part.rows
        assert all(len(row.cells) == len(part.columns) for row in part.rows)
        assert all(len(row.heads) == len(part.heads) for row in part.rows)


@pytest.mark.parametrize("name", TABLES)
def test_every_cell_can_be_filled(name: str) -> None:
    """With all logs that tables take no cell is blank, so names and figures are right."""
    everything = {
        log: Log(ATTACKED.answers, certified(0.5).certified) for log in used_logs()
    }  # fmt: skip
    for part in filled_table(name, everything).parts:
        assert all(cell.main for row in part.rows for cell in row.cells)


def test_every_figure_is_a_measure() -> None:
    """The data files name no figure that is not computed."""
    folder = Path(layout.__file__).parent
    for file in [*folder.glob("tables/*.toml"), folder / "ablations.toml"]:
        for line in file.read_text().splitlines():
            if 'figure = "' in line:
                words = [each.split('"')[0].split()[0] for each in line.split('figure = "')[1:]]
                assert set(words) <= set(MEASURES)
    assert {f"{name}.toml" for name in TABLES} == {f.name for f in folder.glob("tables/*.toml")}


def test_a_log_goes_to_every_cell_that_names_it() -> None:
    """The same log is in Tables 6, 7 and 9; certified accuracy stands beside robust in Table 3."""
    logs = {"imagenet/ours-0.25": certified(0.6, 0.0), "imagenet/ours-0.25-pgd-0.5": ATTACKED}
    assert row(filled_table("table-06", logs), "0.5", "✓", "✓")[0].startswith("50.0 [")
    assert row(filled_table("table-09", logs), "0.25", "1")[0] == "0.300"
    assert row(filled_table("table-07", logs), "0.25", "✓", "✓")[0] == "0.300"
    robust, *rest = row(filled_table("table-03", logs), "Ours", "✓")
    assert robust.startswith("25.0 [")
    assert "(50.0 [" in robust
    assert rest[0] == ""
    assert rest[1].startswith("(50.0 [")


def test_the_two_sided_rule_has_a_row_of_radii_alone() -> None:
    """It stands below Cohen's where votes allow; figures without radii are not repeated."""
    both = certified(0.5, rules=("cohen", "two-sided"))
    logs = {"imagenet/ours-0.25": both, "imagenet/ours-0.25-pgd-0.5": ATTACKED}
    assert row(filled_table("table-09", logs), "0.25", "1, two-sided")[0] == "0.500"
    assert row(filled_table("table-03", logs), "Ours", "✓, two-sided")[0].startswith("(100.0 [")


def test_ablations_have_the_points_that_have_logs() -> None:
    """Two points make a line; one or none is not drawn."""
    logs = {"imagenet/unadapted-k1.0-0.25": certified(0.1), "imagenet/unadapted-0.25": certified(1)}
    pictures = {picture.name: picture for picture in ablations(logs)}
    assert [name for name, picture in pictures.items() if picture.drawable] == ["k"]
    line = pictures["k"].panels[0].series["σ = 0.25"]  # noqa: RUF001
    points = dict(zip(pictures["k"].x, line, strict=True))
    assert (points[1.0], points[1.8], points[2.0]) == (0.1, 1.0, None)


# --- Formats -------------------------------------------------------------------------------------

LOGS = {"imagenet/ours-0.5": certified(0.6, 0.0), "imagenet/ours-0.5-predict": ATTACKED}


def test_markdown_has_a_line_a_row() -> None:
    """Every line of a table has the same cells, blank ones too."""
    text = markdown(filled_table("table-07", LOGS))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4 * 8
    assert {line.count("|") for line in lines} == {11}
    assert "| 0.5 | ✓ | ✓ | 0.300 | 50.0 [9.5, 90.5] |" in text
    assert "| 0.25 | ✓ | ✓ |  |  |" in text


def test_comma_separated_values_are_the_figures() -> None:
    """Shares in [0, 1] with interval and images; blanks where there is no log."""
    lines = list(csv.DictReader(StringIO(comma_separated(filled_table("table-03", LOGS)))))
    assert len(lines) == 6 * 4 + 2
    (found,) = [
        line for line in lines
        if (line["Method"], line["column"], line["place"]) == ("Ours", "clean, ε = 1", "beside")
    ]  # fmt: skip
    low, high = wilson_interval(1, 2)
    assert float(found["value"]) == 0.5
    assert float(found["low"]) == pytest.approx(low, abs=1e-6)
    assert float(found["high"]) == pytest.approx(high, abs=1e-6)
    assert (found["images"], found["kind"], found["rule"]) == ("2", "share", "cohen")
    assert sum(line["value"] == "" for line in lines) == 24 - 1 - 4  # Four are as printed.


def test_latex_is_balanced_and_escaped() -> None:
    """Rows have as many cells as the tabular has columns, and no special character is bare."""
    text = latex(filled_table("table-03", LOGS))
    (shape,) = [line for line in text.splitlines() if line.startswith(r"\begin{tabular}")]
    assert shape == r"\begin{tabular}{llrrrr}"
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 7
    assert {line.count(" & ") for line in rows} == {5}
    assert text.count(r"\begin") == text.count(r"\end")
    assert r"accuracy (\%) on ImageNet" in text
    assert r"robust, $\varepsilon$ = 0.5" in text
    assert text.isascii()


# --- Published logs ------------------------------------------------------------------------------


def test_the_paper_s_imagenet_rows_come_out_to_the_digit() -> None:
    """Tables 3, 6, 7 and 9 from the authors' logs: certified accuracy and ACR as printed there."""
    logs = read_logs(
        [f"imagenet/ours-{float(s):g}={published(IMAGENET + s)}" for s in ("0.25", "0.50")]
    )
    for name, heads in (("table-07", ("✓", "✓")), ("table-09", ("1",))):
        table = filled_table(name, logs)
        values = [cell.split()[0] for cell in row(table, "0.25", *heads)]
        assert values[:5] == ["0.303", "53.4", "44.8", "34.2", "21.6"]
        values = [cell.split()[0] for cell in row(table, "0.5", *heads)]
        assert values == ["0.409", "46.0", "38.8", "32.4", "25.0", "20.6", "15.4"]
    assert row(filled_table("table-06", logs), "0.5", "✓", "✓")[0].split()[0] == "34.2"
    assert row(filled_table("table-06", logs), "1", "✓", "✓")[0].split()[0] == "20.6"
    beside = [cell.split()[0] for cell in row(filled_table("table-03", logs), "Ours", "✓")]
    assert beside == ["(34.2", "(20.6", "(53.4", "(46.0"]


def test_cohen_s_cifar10_rows_come_out_to_the_digit() -> None:
    """The anchors of method.md section 6."""
    logs = read_logs(
        [f"cifar10/cohen-{float(s):g}={published(CIFAR + s)}" for s in ("0.25", "0.50")]
    )
    table = filled_table("cifar10", logs)
    anchors = {
        "0.25": ["0.424", "76.6", "61.2", "42.2", "25.1"],
        "0.5": ["0.525", "65.7", "54.9", "42.8", "32.5", "22.0"],
    }
    for sigma, expected in anchors.items():
        cells = row(table, sigma, "Cohen et al., ResNet-110")
        assert [cell.split()[0] for cell in cells][: len(expected)] == expected
