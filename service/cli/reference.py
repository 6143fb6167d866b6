"""The pages of docs/reference, from the code: `python -m service.cli.reference`.

Settings come from their fields, commands from their parameters, errors from their classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from service import errors
from service.cli.console import EXAMPLE
from service.cli.main import HELP, app
from service.config import PREFIX, Settings

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
_MADE = "`make reference` makes this page from the code; a test holds it current."
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_RETRIES = {
    429: "after `Retry-After`",
    500: "once; then the log has the reason",
    503: "after `Retry-After`",
    504: "no: GET the job, which goes on",
    507: "after tasks were deleted",
}
"""What a client does about a status; any other needs another request."""
_SPECIAL_RETRIES = {
    "cancelled": "the same request is a new job",
    "task-failed": "after what `problem` says",
    "adaptation-failed": "after what the detail says",
    "task-unusable": "no: the operator restores the networks",
    "engine-unavailable": "in some seconds",
    "job-lost": "the same request is a new job",
}
"""What a client does about other errors of the same status."""
_OTHER_RETRY = "no: change the request"


def settings() -> str:
    """docs/reference/settings.md."""
    rows = (
        [
            f"`{PREFIX}{name.upper()}`",
            _default(field.get_default(call_default_factory=True)),
            ", ".join([*_limits(field.metadata), *_choices(field.annotation)]),
            field.description or "",
        ]
        for name, field in sorted(Settings.model_fields.items())
    )
    return _page(
        "Settings",
        "The environment has them. A setting may be [a file](../operations.md#secrets-as-files) "
        "instead. The log warns of a `VOUCHSAFE_` variable that is none of these.",
        _table(("variable", "default", "limits", "meaning"), rows),
    )


def _default(value: object) -> str:
    if value is None or value in ("", (), []):
        return ""
    return f"`{','.join(map(str, value)) if isinstance(value, (tuple, list)) else value}`"


def _limits(metadata: list[Any]) -> Iterator[str]:
    for constraint in metadata:
        for name, words in _LIMITS.items():
            if (limit := getattr(constraint, name, None)) is not None:
                yield f"{words} {limit:,}"


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield "one of " + ", ".join(f"`{choice}`" for choice in get_args(annotation))


def problems() -> str:
    """docs/reference/errors.md."""
    kinds: list[type[errors.Problem]] = [*errors.Problem.__subclasses__(), errors.Problem]
    unique = {kind.slug: kind for kind in kinds}.values()
    rows = (
        [
            f"`{kind.slug}`",
            str(kind.status),
            kind.title,
            _sentence(kind) if kind is not errors.Problem else "A fault of the service.",
            _SPECIAL_RETRIES.get(kind.slug) or _RETRIES.get(kind.status, _OTHER_RETRY),
        ]
        for kind in sorted(unique, key=lambda kind: (kind.status, kind.slug))
    )
    return _page(
        "Errors",
        "Every error is a problem document ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)) of "
        "the type `application/problem+json`. Its `type` is `urn:vouchsafe:problem:` and a word of "
        "this table. `detail` says what to change, and `errors` names each field with its value "
        "and limit. [operations.md](../operations.md#common-failures) has what an operator does.",
        _table(("`type`", "status", "`title`", "cause", "retry"), rows),
    )


def _sentence(kind: type[errors.Problem]) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def commands() -> str:
    """docs/reference/cli.md."""
    root: Any = typer.main.get_command(app)
    words = " ".join(HELP.split("\n\n")[1].split())
    more = (
        "`vouchsafe COMMAND --help` prints the same. `vouchsafe --install-completion` installs "
        f"completion. {words}"
    )
    return _page("The command line", more, *_described("vouchsafe", root))


def _described(name: str, command: Any) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if name != "vouchsafe":
        paragraphs = (command.help or "").split("\n\n")
        described = [f"## {name}", *(" ".join(paragraph.split()) for paragraph in paragraphs)]
        if command.epilog:
            example = str(command.epilog).removeprefix(EXAMPLE)
            described.append(f"```sh\n.venv/bin/{example}\n```")
        rows = [_parameter(each) for each in command.params if each.name != "help"]
        if rows:
            described.append(_table(("parameter", "default", "meaning"), rows))
        yield "\n\n".join(described)
    for child in children.values():
        yield from _described(f"{name} {child.name}", child)


def _parameter(parameter: Any) -> list[str]:
    is_argument = parameter.param_type_name == "argument"
    names = parameter.name.upper() if is_argument else ", ".join(parameter.opts)
    shown = parameter.show_default if not is_argument else None
    default = "required" if parameter.required else _default(parameter.default)
    if isinstance(shown, str):
        default = f"`{shown}`"
    elif isinstance(parameter.default, bool):
        default = ""
    return [f"`{names}`", default, f"{parameter.help or ''} {_range(parameter)}"]


def _range(parameter: Any) -> str:
    """The choices or the limits of a parameter."""
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"One of {', '.join(f'`{each.value}`' for each in kind)}."
    ends = (("at least", parameter.min), ("at most", parameter.max))
    named = [f"{words} {limit:,}" for words, limit in ends if limit is not None]
    return f"({', '.join(named)})" if named else ""


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", _MADE, *parts]) + "\n"


PAGES = {"settings.md": settings, "errors.md": problems, "cli.md": commands}


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
