"""The house's words: documents have none that CONTRIBUTING.md's rules for prose forbid."""

from __future__ import annotations

import ast
import re
from inspect import cleandoc
from pathlib import Path

import pytest

from tests.support.paths import ROOT

GLOBS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/how-to/*.md",
    "docs/reference/*.md",
    "service/**/*.py",
    "models/**/*.py",
    "tests/**/test_prose.py",
)
"""The documents, and the modules whose docstrings are read alike."""

PHRASES = (
    r"whoever|somebody|anew|in vain|besides|so many|of (?:its|his|her) own|put aside",
    r"lets? (?:go|be)|letting (?:go|be)|befalls?|befell|ha(?:ve|s|d|ving) in hand",
)
SPELLINGS = (
    r"artefacts?|licences?|licenced|catalogues?|grey|centres?|centred|learnt|defence|whilst",
    r"(?:colo|behavio|neighbo|favo|hono|labo)ur\w*|labell\w+|modell\w+|analys(?:e|ed|es|ing)",
    r"(?:recogn|optim|normal|initial|serial|organ|summar|token|quant|categor|general|minim|maxim)"
    r"is(?:e|ed|es|er|ing|ation)",
    r"synthesis(?:e|ed|es|ing)",
)
FORBIDDEN = re.compile(rf"\b(?:{'|'.join((*PHRASES, *SPELLINGS))})\b", re.IGNORECASE)
FENCED = r"^ *```.*?^ *```"
INDENTED = r"^(?: {4}|\t)\S[^\n]*$"
INLINE = r"`[^`]+`"
ADDRESS = r"\]\([^)]*\)"
CODE = re.compile(f"{FENCED}|{INDENTED}|{INLINE}|{ADDRESS}", re.DOTALL | re.MULTILINE)

PAGES = sorted(path for glob in GLOBS for path in ROOT.glob(glob))


def prose(path: Path) -> str:
    """The words of a page without its code and links, or those of a module's docstrings."""
    text = path.read_text()
    if path.suffix == ".py":
        found = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
        strings = (node.value for node in found if isinstance(node, ast.Constant))
        text = "\n\n".join(cleandoc(each) for each in strings if isinstance(each, str))
    return words(text)


def words(text: str) -> str:
    """The text on one line, with a backtick in the place of each piece of code."""
    return " ".join(CODE.sub(" ` ", text).split())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_word(path: Path) -> None:
    """A page's words are the house's: no forbidden phrase, no British spelling."""
    text = prose(path)
    found = [text[max(0, m.start() - 40) : m.end() + 20] for m in FORBIDDEN.finditer(text)]
    assert not found


@pytest.mark.parametrize("glob", GLOBS)
def test_every_glob_finds_something(glob: str) -> None:
    """No page leaves the test by being moved."""
    assert [*ROOT.glob(glob)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It lets\n  go of a lease.", ["lets go"]),
        ("Somebody asks anew.", ["Somebody", "anew"]),
        ("The field `licence` of\n\n```json\n{'licence': 'grey'}\n```\n", []),
        ("Begin:\n\n    the colour\n\nand end.", []),
        ("[a page](docs/catalogue.md) of colors and syntheses", []),
        ("A catalogue of colours, recognised.", ["catalogue", "colours", "recognised"]),
    ],
)
def test_words_are_found_but_in_code(text: str, found: list[str]) -> None:
    """Code, fields and addresses are not prose; a phrase may go over a line's end."""
    assert FORBIDDEN.findall(words(text)) == found
