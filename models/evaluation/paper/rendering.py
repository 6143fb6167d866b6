"""Filled tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from io import StringIO

from models.evaluation.paper.figures import Figure
from models.evaluation.paper.layout import Part, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "σ": r"$\sigma$",  # noqa: RUF001
    "ε": r"$\varepsilon$",
    "λ": r"$\lambda$",
    "±": r"$\pm$",
    "×": r"$\times$",  # noqa: RUF001
    "✓": r"$\checkmark$",
}


def markdown(table: Table) -> str:
    """The table under its caption, each part under its title."""
    blocks = [f"**{table.caption}**"]
    for part in table.parts:
        if part.title:
            blocks.append(part.title)
        lines = [[*part.heads, *part.columns], ["---"] * (len(part.heads) + len(part.columns))]
        lines += [[*row.heads, *(cell.text() for cell in row.cells)] for row in part.rows]
        escaped = [[text.replace("|", "\\|") for text in line] for line in lines]
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in escaped))
    return "\n\n".join(blocks) + "\n"


def latex(table: Table) -> str:
    """A `table` environment with a `tabular` a part; needs booktabs and amssymb."""
    parts = "\n\n\\medskip\n".join(_tabular(part) for part in table.parts)
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_escaped(table.caption)}}}\n{parts}\n"
        "\\end{table}\n"
    )


def comma_separated(table: Table) -> str:
    """A line a figure: part, heads, rule, column, and the value with its interval and images.

    Shares are in [0, 1]. A figure beside another has `beside` in its `place`. Cells without a
    figure have a line without a value.
    """
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    heads = [head or "row" for head in table.parts[0].heads]
    writer.writerow(
        ["part", *heads, "rule", "column", "place", "kind", "value", "low", "high", "images"]
    )
    for part in table.parts:
        for row in part.rows:
            for column, cell in zip(part.columns, row.cells, strict=True):
                start = [part.title, *row.heads, row.rule, column]
                writer.writerow([*start, "main", *_fields(cell.main)])
                if cell.beside is not None:
                    writer.writerow([*start, "beside", *_fields(cell.beside)])
    return stream.getvalue()


FORMATS: dict[str, tuple[str, Callable[[Table], str]]] = {
    "markdown": ("md", markdown),
    "csv": ("csv", comma_separated),
    "latex": ("tex", latex),
}
"""By name, the suffix of its files and the function that writes them."""


def _tabular(part: Part) -> str:
    lines: list[Sequence[str]] = [[*part.heads, *part.columns]]
    lines += [[*row.heads, *(cell.text() for cell in row.cells)] for row in part.rows]
    first, *rest = [" & ".join(map(_escaped, line)) + r" \\" for line in lines]
    title = f"{_escaped(part.title)}\\par\n" if part.title else ""
    shape = "l" * len(part.heads) + "r" * len(part.columns)
    body = "\n".join([r"\toprule", first, r"\midrule", *rest, r"\bottomrule"])
    return f"{title}\\begin{{tabular}}{{{shape}}}\n{body}\n\\end{{tabular}}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


def _fields(figure: Figure | None) -> list[object]:
    if figure is None:
        return [""] * 5
    ends = ["" if end is None else round(end, 6) for end in (figure.low, figure.high)]
    return [figure.kind, round(figure.value, 6), *ends, figure.images]
