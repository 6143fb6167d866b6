"""README and docs/: commands exist, links lead somewhere, and what is named is there.

`make`, `vouchsafe` and `python -m` are parsed here: targets, commands, modules and options exist.
Not looked at: `docker`, `kubectl` and what else needs a machine of its kind.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from service.cli.main import app as command_line
from service.config import PREFIX, Settings
from service.predictions.demonstrations import DemonstrationRequest
from service.predictions.question import PredictRequest
from service.tasks.schemas import TaskRequest
from tests.support.documents import API, PAGES, README, TREE, commands, inline, name
from tests.support.paths import ROOT
from tests.support.serving import Service

HISTORY = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
CARD = ROOT / "models" / "nano" / "card.md"
VOUCHSAFE = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|docker compose exec \w+ )?vouchsafe ([^#&|;]*)"
)
MADE = (
    *("references.png", "status.json", "source.json", "docker/secrets"),
    *("results.json", "table.md", "curve.png", "vouchsafe_example.py", "meta/test.json"),
    *("concepts.json", "concepts.svg"),
)
"""Files and folders that programs or readers make, so that no checkout has them."""


def test_readme_is_short() -> None:
    """A stranger reads it whole: 150 lines at most."""
    assert len(README.read_text().splitlines()) <= 150


def test_every_table_that_figures_renews_has_its_place() -> None:
    """The pages have the blocks that benchmarks/figures.sh fills, each once."""
    script = (ROOT / "benchmarks" / "figures.sh").read_text()
    filled = re.findall(r"into (\S+) (\S+)", script)
    assert filled
    for page, block in filled:
        text = (ROOT / page).read_text()
        assert len(re.findall(rf"<!-- {block} -->\n\|.*?<!-- end -->", text, re.DOTALL)) == 1, page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_has_the_targets(page: Path) -> None:
    """Every `make` command names targets and variables of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    text = page.read_text()
    for one in [*commands(text), *inline(text)]:
        if one.startswith("make "):
            words = one.partition("#")[0].split()[1:]
            given = {word.partition("=")[0] for word in words if "=" in word}
            assert {word for word in words if "=" not in word} <= set(phony.split()), one
            assert given <= variables, one


@pytest.mark.parametrize("page", [*PAGES, *HISTORY], ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    """Every `vouchsafe` command has its options, and so has every module that is run."""
    for one in commands(page.read_text()):
        if found := VOUCHSAFE.match(one):
            assert not unknown_options(found[1].split()), one
        for module, words in re.findall(r"python -m (\w[\w.]*)([^#&|;]*)", one):
            file = ROOT / f"{module.replace('.', '/')}.py"
            if module.partition(".")[0] in TREE:
                known = re.findall(r'"(?:--)?([\w-]+)"', file.read_text())
                assert set(re.findall(r" --([\w-]+)", words)) <= set(known), one


def unknown_options(words: list[str]) -> list[str]:
    """The options that the command does not have; fails where there is no such command."""
    command: Any = typer.main.get_command(command_line)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *HISTORY, CARD], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link within the repository leads to a file, and its anchor to a heading there."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http:", "https:")):
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page: Path) -> None:
    """Every file and folder of the repository that a page names is there."""
    text = page.read_text()
    suffixes = "py|md|yml|yaml|lua|toml|lock|env|conf|json|png"
    files = set(
        re.findall(rf"(?<![\w/.~-])((?:{'|'.join(TREE)})/[\w./-]+\.(?:{suffixes}))\b", text)
    )
    for each in inline(text):
        if re.fullmatch(rf"[\w][\w/-]*\.(?:{suffixes})|(?:{'|'.join(TREE)})(?:/[\w-]+)*", each):
            files.add(each)
    missing = [each for each in files if not each.startswith(MADE) and not there(each, page)]
    assert not missing


def there(path: str, page: Path) -> bool:
    """Whether the repository has it, under its whole path or under the end of one."""
    if (ROOT / path).exists() or (page.parent / path).exists():
        return True
    return any(next((ROOT / top).rglob(path), None) for top in TREE)


def test_the_architecture_has_every_folder() -> None:
    """docs/architecture.md names each package of the service and the models."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = [file.parent for top in TREE[:2] for file in (ROOT / top).glob("*/__init__.py")]
    assert packages
    assert not [name(each) for each in packages if f"`{name(each)}`" not in text]


def test_the_index_has_every_page() -> None:
    """docs/README.md links each page beside it."""
    index = ROOT / "docs" / "README.md"
    pages = {page.name for page in index.parent.glob("*.md")} - {index.name}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", index.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_exist(page: Path) -> None:
    """Every variable that a page names is a setting."""
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields}
    assert set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", page.read_text())) <= known


async def test_the_reference_is_whole(service: Service) -> None:
    """docs/api.md has each call and each field of a question, and no other.

    Those of the Open Inference Protocol are in docs/protocol.md.
    """
    text = API.read_text()

    def table(heading: str) -> str:
        return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]

    paths = (await service.client.get("/openapi.json")).json()["paths"]
    calls = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    pages = {"GET /", "GET /docs", "GET /openapi.json"}
    v2 = {call for call in calls if call.partition(" ")[2].startswith("/v2")}
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    described = set(re.findall(r"`([A-Z]+ /v2[^`]*)`", protocol))
    assert described == {call for call in v2 if "/versions/" not in call}
    assert set(re.findall(r"`([A-Z]+ /[^`]*)`", table("Calls"))) == calls - v2 | pages
    documents: dict[str, type[BaseModel]] = {
        "POST /predict": PredictRequest,
        "POST /demonstrations": DemonstrationRequest,
        "POST /tasks": TaskRequest,
    }
    for call, kind in documents.items():
        rows = re.findall(r"^\| (`\w.*?) \|", table(f"Fields of {call}"), re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(kind.model_fields)
