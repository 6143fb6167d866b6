"""The command `tables`: the paper's tables from certification logs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from service.cli.console import errors, tell

Logs = Annotated[
    list[str],
    typer.Argument(help="Logs, folders of them, or DATASET/RUN=LOG (names: docs/tables.md)."),
]


class Format(StrEnum):
    """The formats of tables."""

    MARKDOWN = "markdown"
    CSV = "csv"
    LATEX = "latex"


def tables(
    logs: Logs,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the files; without it, print the tables.")
    ] = None,
    formats: Annotated[
        list[Format] | None,
        typer.Option("--format", help="Repeatable.", show_default="all with --out, else markdown"),
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(help="A table's number, or cifar10; repeatable.", show_default="all"),
    ] = None,
) -> None:
    """Fill the paper's tables from logs: certified accuracy, ACR, intervals; blank where one lacks.

    Exits with 2 for a log or an option that cannot be used.
    """
    from models.evaluation.paper.layout import TABLES, filled_table, used_logs
    from models.evaluation.paper.rendering import FORMATS
    from models.evaluation.paper.sources import read_logs

    try:
        wanted = [_table_name(each, TABLES) for each in table or TABLES]
        found = read_logs(logs)
    except ValueError as error:
        tell(error)
        raise typer.Exit(2) from error
    for name in sorted(found.keys() - used_logs()):
        errors.print(f"{name} is in no table")
    filled = [filled_table(name, found) for name in wanted]
    if out is None:
        for each in filled:
            for form in formats or [Format.MARKDOWN]:
                print(FORMATS[form][1](each))
        return
    from models.files import written_whole

    out.mkdir(parents=True, exist_ok=True)
    for each in filled:
        for form in formats or list(Format):
            suffix, written = FORMATS[form]
            file = out / f"{each.name}.{suffix}"
            with written_whole(file) as partial:
                partial.write_text(written(each), "utf-8")
                partial.chmod(0o644)
    count = sum(each.filled for each in filled)
    errors.print(f"wrote {len(filled)} tables to {out}; {count} have figures")


def _table_name(given: str, names: tuple[str, ...]) -> str:
    name = f"table-{int(given):02d}" if given.isdecimal() else given
    if name not in names:
        raise ValueError(f"table = {given!r}: must be 1 to 10, or cifar10")
    return name
