"""docs/reference: the pages are those that the code makes, and whole."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from service import errors
from service.cli.main import EXAMPLE, app
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


def test_every_command_has_an_example() -> None:
    """The example names the command, and options that it has."""
    root: Any = typer.main.get_command(app)
    plain = [command for command in root.commands.values() if not hasattr(command, "commands")]
    assert len(plain) > 8
    for command in plain:
        words = command.epilog.removeprefix(EXAMPLE).split()
        assert words[:2] == ["vouchsafe", command.name]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
