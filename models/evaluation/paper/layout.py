"""The paper's tables and ablations as data files: which figure of which log goes where.

A table has `rows` and `columns`, whose fields together describe a cell: `log`, the name of a log,
and `figure`, one of MEASURES; `beside_log` and `beside_figure` alike for a second one in
parentheses. Fields may name others in braces. Those of a column go before those of its row, and
both before those of the table. `heads` are the fields that a row begins with, and their titles.
`parts` repeat a table with other fields. A column with `average` has the mean of its row.

Rows of methods that no command here makes carry the paper's own figures in percent, a value a
column, in the field that the table's `printed` names. They stand in where logs are missing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from models.evaluation.paper.figures import Figure, average, depends_on_rule, measured
from models.evaluation.paper.sources import COHEN, TWO_SIDED, Log

TABLES = (*(f"table-{number:02d}" for number in range(1, 11)), "cifar10")
"""The paper's ten, and one for CIFAR-10."""
PRINTED = "printed"
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and one beside it in parentheses; each is None where its log is missing."""

    main: Figure | None
    beside: Figure | None = None

    def text(self) -> str:
        """Both as the tables print them; empty without figures."""
        shown = [] if self.main is None else [self.main.text()]
        if self.beside is not None:
            shown.append(f"({self.beside.text()})")
        return " ".join(shown)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: its heads, then a cell a column.

    `rule` is that of its radii, or PRINTED where the figures are the paper's own.
    """

    heads: tuple[str, ...]
    cells: tuple[Cell, ...]
    rule: str


@dataclass(frozen=True, slots=True)
class Part:
    """A table, or a part of one with a title."""

    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A filled table."""

    name: str
    caption: str
    parts: tuple[Part, ...]

    @property
    def filled(self) -> bool:
        """Whether any cell has the figure of a log."""
        rows = (row for part in self.parts for row in part.rows if row.rule != PRINTED)
        return any(cell.text() for row in rows for cell in row.cells)


@dataclass(frozen=True, slots=True)
class Panel:
    """A quantity over x: by series, its values, None where a log is missing."""

    title: str
    series: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Picture:
    """An ablation: the panels over the values `x` of what `label` names.

    `scale` are the arguments of matplotlib's `set_xscale`.
    """

    name: str
    label: str
    x: tuple[float, ...]
    panels: tuple[Panel, ...]
    scale: Mapping[str, Any]

    @property
    def drawable(self) -> bool:
        """Whether a line has two points or more."""
        lines = (line for panel in self.panels for line in panel.series.values())
        return any(len(line) - list(line).count(None) > 1 for line in lines)


def filled_table(name: str, logs: Mapping[str, Log]) -> Table:
    """The table `name`, one of TABLES, with the figures of the logs by Cohen's rule.

    Below a row whose logs have vote counts, the same row by the two-sided rule.
    """
    table = _document(f"tables/{name}.toml")
    return Table(name, table["caption"], tuple(_part(part, logs) for part in _parts(table)))


def used_logs() -> set[str]:
    """The names of all logs that a table can take."""
    return {
        _resolved(fields, key)
        for name in TABLES
        for table in _parts(_document(f"tables/{name}.toml"))
        for row in table["rows"]
        for fields in ({**table, **row, **column} for column in table["columns"])
        for key in ("log", "beside_log")
        if key in fields and "average" not in fields
    }


def ablations(logs: Mapping[str, Log]) -> list[Picture]:
    """The ablations, with the figures of the logs by Cohen's rule."""
    found = []
    for picture in _document("ablations.toml")["pictures"]:
        panels = [
            Panel(
                panel["title"],
                {
                    series["name"]: [
                        _value({**picture, **panel, **series, **point}, logs)
                        for point in picture["x"]
                    ]
                    for series in picture["series"]
                },
            )
            for panel in picture["panels"]
        ]
        x = tuple(point["x"] for point in picture["x"])
        scale = picture.get("scale", {"value": "linear"})
        found.append(Picture(picture["name"], picture["label"], x, tuple(panels), scale))
    return found


def _document(name: str) -> dict[str, Any]:
    return tomllib.loads((files("models.evaluation.paper") / name).read_text("utf-8"))


def _parts(table: Fields) -> list[Fields]:
    return [{**table, **part} for part in table.get("parts", [{}])]


def _part(table: Fields, logs: Mapping[str, Log]) -> Part:
    heads: Mapping[str, str] = table["heads"]
    rows = []
    for row in table["rows"]:
        named = tuple(row[head] for head in heads)
        cells = _cells(table, row, logs, COHEN)
        printed = row.get(table.get("printed"))
        if printed and not any(cell.text() for cell in cells):
            cells = tuple(Cell(Figure(share / 100, None, None, None, "share")) for share in printed)
            rows.append(Row((*named[:-1], f"{named[-1]}, as printed"), cells, PRINTED))
            continue
        rows.append(Row(named, cells, COHEN))
        cells = _cells(table, row, logs, TWO_SIDED)
        if any(cell.text() for cell in cells):
            rows.append(Row((*named[:-1], f"{named[-1]}, {TWO_SIDED}"), cells, TWO_SIDED))
    columns = tuple(column["head"] for column in table["columns"])
    return Part(table.get("title", ""), tuple(heads.values()), columns, tuple(rows))


def _cells(table: Fields, row: Fields, logs: Mapping[str, Log], rule: str) -> tuple[Cell, ...]:
    cells: list[Cell] = []
    for column in table["columns"]:
        if column.get("average"):
            mains, besides = (
                [getattr(cell, name) for cell in cells] for name in ("main", "beside")
            )
            cells.append(Cell(average(mains), average(besides)))
        else:
            fields = {**table, **row, **column}
            cells.append(
                Cell(_figure(fields, "", logs, rule), _figure(fields, "beside_", logs, rule))
            )
    return tuple(cells)


def _figure(fields: Fields, prefix: str, logs: Mapping[str, Log], rule: str) -> Figure | None:
    """The figure of a cell; only those of radii have one by the two-sided rule."""
    if f"{prefix}log" not in fields:
        return None
    name = _resolved(fields, f"{prefix}figure")
    if rule == TWO_SIDED and not depends_on_rule(name):
        return None
    return measured(name, logs.get(_resolved(fields, f"{prefix}log")), rule)


def _value(fields: Fields, logs: Mapping[str, Log]) -> float | None:
    found = _figure(fields, "", logs, COHEN)
    return None if found is None else found.value


def _resolved(fields: Fields, key: str) -> str:
    text: str = fields[key]
    while "{" in text:
        text = text.format_map(fields)
    return text
