"""The pages of README and docs/, and the commands in them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.paths import ROOT

README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
API, FLEET = ROOT / "docs" / "api.md", ROOT / "docs" / "scaling.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    *sorted((ROOT / "docs" / "reference").glob("*.md")),
]
TREE = ("service", "models", "tests", "docs", "deploy", "docker", "benchmarks")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[str]:
    """The shell commands of a page or section, by block."""
    return re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The shell commands one by one, each with its continuation lines."""
    lines = "".join(blocks(text)).replace("\\\n", "").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def inline(text: str) -> list[str]:
    """What stands in backticks outside blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
