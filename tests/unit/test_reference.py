"""docs/reference: the pages are those that the code makes, and whole."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from service import errors
from service.cli.console import EXAMPLE
from service.cli.main import app
from service.cli.reference import FOLDER, PAGES
from service.config import PREFIX, Settings


@pytest.mark.parametrize("name", PAGES)
def test_each_page_is_current(name: str) -> None:
    """`make reference` would change nothing."""
    assert (FOLDER / name).read_text(encoding="utf-8") == PAGES[name]()


def test_no_page_is_left_behind() -> None:
    """The folder holds the made pages and no other."""
    assert sorted(file.name for file in FOLDER.iterdir()) == sorted(PAGES)


def test_every_problem_and_setting_is_there() -> None:
    """Each class of problem with its status, each setting by its variable."""
    problems, settings = PAGES["errors.md"](), PAGES["settings.md"]()
    for kind in (errors.Problem, *errors.Problem.__subclasses__()):
        assert f"| `{kind.slug}` | {kind.status} |" in problems
    for name in Settings.model_fields:
        assert f"| `{PREFIX}{name.upper()}` |" in settings


def leaves(command: Any, words: tuple[str, ...] = ("vouchsafe",)) -> Iterator[tuple[str, Any]]:
    """Every command by its words; those of a group, and the group where it runs by itself."""
    children = getattr(command, "commands", {})
    if not children:
        yield " ".join(words), command
    for child in children.values():
        yield from leaves(child, (*words, child.name))


ROOT_COMMAND: Any = typer.main.get_command(app)


@pytest.mark.parametrize(("name", "command"), list(leaves(ROOT_COMMAND)))
def test_every_command_has_an_example(name: str, command: Any) -> None:
    """The command accepts the example's words."""
    example = command.epilog.removeprefix(EXAMPLE)
    assert example.startswith(name)
    command.make_context(name, shlex.split(example.removeprefix(name)))
