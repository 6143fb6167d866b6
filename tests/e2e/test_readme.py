"""README's commands for a fleet: they work as written, and leave the checkout as it was."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.server import START_SECONDS, free_port
from tests.support.paths import ROOT

SERVE = re.compile(r"^\.venv/bin/vouchsafe serve .*$", re.MULTILINE)


def blocks() -> list[str]:
    """The commands of "Past one machine": those that start the fleet, those that stop it."""
    section = (ROOT / "README.md").read_text().partition("## Past one machine")[2]
    return re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)


def test_redis_evicts_nothing_and_has_a_directory_of_its_own() -> None:
    """Both are options of the one line that starts Redis."""
    (line,) = re.findall(r"^redis-server .*$", blocks()[0], re.MULTILINE)
    assert "--maxmemory-policy noeviction" in line
    assert "--dir ~/vouchsafe-redis" in line


def test_the_fleet_starts_answers_and_stops(redis_program: None, tmp_path: Path) -> None:
    """All commands run word for word but for their ports; afterwards nothing of them is left."""
    start, stop = blocks()
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
        until_served(f"http://127.0.0.1:{port}", shell)
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


def until_served(url: str, shell: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert shell.poll() is None
        try:
            if httpx.get(f"{url}/models", timeout=10).json()["models"][0]["ready"]:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("no worker served the default task in time")
