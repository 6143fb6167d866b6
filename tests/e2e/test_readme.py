"""README's commands, word for word but for ports and ids.

They run in an empty folder that has the repository's `docs` and `.venv`:

- every `curl`, `vouchsafe predict`, `jwks` and `verify` of README.md, docs/tutorial.md and
  docs/api.md, in order,
  against one server. The server is `tests.support.fake_server`: the embedded one with nano's
  networks, but adaptation jobs that take no minutes;
- the commands for a fleet of docs/scaling.md, against a Redis.

tests/unit/test_docs.py parses the commands that run for minutes or need more machines.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.server import START_SECONDS, free_port
from benchmarks.server import serving as server_process
from tests.support.documents import API, FLEET, README, TUTORIAL, blocks, commands
from tests.support.paths import ROOT

CERTIFICATE = re.compile(r'"type":"urn:vouchsafe:certificate:1","id":"([\w-]+)"')
LOCATION = re.compile(
    r"^location: /(batches|demonstrations|jobs|tasks)/(\S+)", re.MULTILINE | re.IGNORECASE
)
SERVE = re.compile(r"^\.venv/bin/vouchsafe serve .*$", re.MULTILINE)


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
        for page in (README, TUTORIAL, API)
        for one in commands(page.read_text())
        if not one.startswith("make ")
    ]
    told = tuple(f".venv/bin/vouchsafe {command} " for command in ("predict", "jwks", "verify"))
    assert all(one.startswith(("curl ", *told)) for one in asked)
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
            ids |= dict(LOCATION.findall(answers[-1]))
            if found := CERTIFICATE.search(answers[-1]):
                ids.setdefault("certificates", found[1])  # Later ones go with their jobs.
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
