"""README and docs/: commands work, links lead somewhere, and what is named is there.

Run, word for word but for ports and ids, in an empty folder that has the repository's `docs` and
`.venv`:

- every `curl` and `vouchsafe predict` of README.md and docs/api.md, in order, against one server.
  The server is `tests.support.fake_server`: the embedded one with nano's networks, but adaptation jobs that
  take no minutes;
- the commands for a fleet of docs/scaling.md, against a Redis.

Only parsed, that is, targets, commands, modules and options exist:

- `make`: it installs the environment, and `make test` would run this test;
- `vouchsafe` and `python -m` of the other pages: they measure for minutes to hours, adapt, fetch
  networks of many GB, or belong to a fleet on several machines.

Not looked at: `docker`, `kubectl` and what else needs a machine of its kind (tests of deployment).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from benchmarks.server import START_SECONDS, free_port
from benchmarks.server import serving as server_process
from service import errors
from service.cli.main import app as command_line
from service.config import PREFIX, Settings
from service.predictions.schemas import PredictRequest
from service.tasks.schemas import TaskRequest
from tests.support.paths import ROOT
from tests.support.serving import Service

README, API, FLEET = ROOT / "README.md", ROOT / "docs" / "api.md", ROOT / "docs" / "scaling.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]
CARD = ROOT / "models" / "nano" / "card.md"
VOUCHSAFE = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|docker compose exec \w+ )?vouchsafe ([^#&|;]*)"
)
SERVE = re.compile(r"^\.venv/bin/vouchsafe serve .*$", re.MULTILINE)
TREE = ("service", "models", "tests", "docs", "deploy", "docker", "benchmarks")
MADE = ("references.png", "source.json", "docker/secrets")
"""Files and folders that programs make, so that no checkout has them."""


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with what the commands name of the repository."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for each in ("docs", ".venv"):
        (checkout / each).symlink_to(ROOT / each)
    return checkout


def test_the_commands_work_in_order(folder: Path, tmp_path: Path) -> None:
    """What README and the reference have a reader type succeeds; the first answer is README's."""
    asked = [
        one
        for page in (README, API)
        for one in commands(page.read_text())
        if not one.startswith("make ")
    ]
    assert all(one.startswith(("curl ", ".venv/bin/vouchsafe predict ")) for one in asked)
    (shown,) = re.findall(r"```json\n(.*?)```", README.read_text(), re.DOTALL)
    ids, answers = dict[str, str](), list[str]()
    fake = (sys.executable, "-m", "tests.support.fake_server")
    with server_process(tmp_path / "data", fake) as (url, _):
        for one in asked:
            if task := re.search(r"task=(\w+)", one):
                until_served(url, ids.get("tasks") if task[1] == "ID" else task[1])
            given = one.replace("http://127.0.0.1:8000", url)
            for kind, known in ids.items():
                given = given.replace(f"{kind}/ID", f"{kind}/{known}")
            answers.append(ran(given.replace("task=ID", f"task={ids.get('tasks')}"), folder))
            ids |= dict(re.findall(r"^location: /(jobs|tasks)/(\S+)", answers[-1], re.M | re.I))
    first, example = json.loads(answers[0]), json.loads(shown)
    assert first.keys() - {"certificate"} == example.keys()
    assert (first["label"], first["certified"]) == (example["label"], True)


def ran(command: str, folder: Path) -> str:
    """The output of a command that succeeds; of curl, with a status below 400."""
    done = subprocess.run(  # noqa: S603
        ["bash", "-c", f'curl() {{ command curl --fail "$@"; }}\n{command}'],  # noqa: S607
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def until_served(url: str, task: str | None = None) -> None:
    """Returns once a worker serves the default task, or the one of this id or name."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        models = httpx.get(f"{url}/models", timeout=10).json()["models"]
        named = [model for model in models if task is None or task in (model["id"], model["name"])]
        if named and named[0]["ready"]:
            return
        time.sleep(0.1)
    raise TimeoutError(f"no worker served {task or 'the default task'} in time")


def fleet_blocks() -> list[str]:
    """The commands that start a fleet on one machine, and those that stop it."""
    section = FLEET.read_text().partition("## Trying one on one machine")[2]
    return blocks(section.partition("\n## ")[0])


def test_redis_evicts_nothing_and_has_a_directory_of_its_own() -> None:
    """Both are options of the one line that starts Redis."""
    (line,) = re.findall(r"^redis-server .*$", fleet_blocks()[0], re.MULTILINE)
    assert "--maxmemory-policy noeviction" in line
    assert "--dir ~/vouchsafe-redis" in line


def test_the_fleet_starts_answers_and_stops(redis_program: None, tmp_path: Path) -> None:
    """All commands run word for word but for their ports; afterwards nothing of them is left."""
    start, stop = fleet_blocks()
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    checkout.mkdir()
    home.mkdir()
    (checkout / ".venv").symlink_to(ROOT / ".venv")
    port, redis_port = free_port(), str(free_port())
    server = f".venv/bin/vouchsafe serve --port {port} & read; kill -INT $! && wait $!"
    start, found = SERVE.subn(server, start.replace("6379", redis_port))
    assert found == 1
    start = start.replace("redis-server ", f"redis-server --port {redis_port} ")
    guard = "set -e; trap 'kill $(jobs -p) 2>/dev/null' EXIT"
    with (tmp_path / "log").open("wb") as log:
        shell = subprocess.Popen(  # noqa: S603
            ["bash", "-m", "-c", f"{guard}\n{start}\n{stop}\njobs\necho STOPPED"],  # noqa: S607
            cwd=checkout,
            env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    try:
        until_up(f"http://127.0.0.1:{port}", shell)
        until_served(f"http://127.0.0.1:{port}")
        shell.communicate(b"\n", timeout=120)
    finally:
        shell.terminate()
        shell.wait(60)
    said = (tmp_path / "log").read_text().splitlines()
    assert said[-1] == "STOPPED", said
    assert not [line for line in said if line.startswith("[") and "Running" in line]
    assert [path.name for path in checkout.iterdir()] == [".venv"]
    assert sorted(path.name for path in home.iterdir()) == ["vouchsafe-fleet", "vouchsafe-redis"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{redis_port}")


def until_up(url: str, shell: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert shell.poll() is None
        try:
            httpx.get(f"{url}/livez", timeout=10)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the API did not listen in time")


def test_readme_is_short() -> None:
    """A stranger reads it whole: 200 lines at most."""
    assert len(README.read_text().splitlines()) <= 200


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
    assert pages <= set(re.findall(r"\]\((\w+\.md)\)", index.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_settings_exist(page: Path) -> None:
    """Every variable that a page names is a setting."""
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields}
    assert set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", page.read_text())) <= known


async def test_the_reference_is_whole(service: Service) -> None:
    """docs/api.md has each call, each field of a question and each problem, and no other."""
    text = API.read_text()

    def table(heading: str) -> str:
        return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]

    paths = (await service.client.get("/openapi.json")).json()["paths"]
    calls = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    pages = {"GET /", "GET /docs", "GET /openapi.json"}
    assert set(re.findall(r"`([A-Z]+ /[^`]*)`", table("Calls"))) == calls | pages
    for call, kind in {"POST /predict": PredictRequest, "POST /tasks": TaskRequest}.items():
        rows = re.findall(r"^\| (`\w.*?) \|", table(f"Fields of {call}"), re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(kind.model_fields)
    problems = re.findall(r"^\| `([a-z-]+)` \| (\d+)", table("Problems"), re.MULTILINE)
    kinds: list[type[errors.Problem]] = [errors.Problem, *errors.Problem.__subclasses__()]
    assert {(slug, int(status)) for slug, status in problems} == {
        (kind.slug, kind.status) for kind in kinds
    }
