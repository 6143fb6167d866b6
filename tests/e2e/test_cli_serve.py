"""`vouchsafe serve` from its start to the line that says that it is ready."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from service.cli import main as cli
from service.config import Settings
from service.operations.health import Condition
from service.operations.server import DrainingServer
from tests.support.paths import ROOT

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from service.cli.main import main; main()"
FORMS = {"embedded": {}, "fleet": {"VOUCHSAFE_REDIS_URL": "redis://127.0.0.1:1/0"}}
READY = re.compile(r"INFO vouchsafe ready at (http://127\.0\.0\.1:\d+); tasks: default; .*: (.*)\n")


@contextmanager
def serve(
    folder: Path,
    *options: str,
    program: str = "from service.cli.main import main; main()",
    **more: str,
) -> Iterator[subprocess.Popen[str]]:
    """A server whose standard error is read; killed at the end where it still runs."""
    others = {name: text for name, text in os.environ.items() if not name.startswith("VOUCHSAFE")}
    with subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", program, "serve", *options],
        cwd=folder,
        env={**others, "PYTHONPATH": str(ROOT), **more},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("form", FORMS)
def test_a_port_in_use_ends_it_before_anything_loads(tmp_path: Path, form: str) -> None:
    """It exits with 1 and one line; no torch was imported and no data directory made."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serve(tmp_path, "--port", str(port), program=WITHOUT_TORCH, **FORMS[form]) as process:
            _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said == f"vouchsafe: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_a_record_of_a_json_log(tmp_path: Path) -> None:
    """Where the log is in JSON, so is that line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serve(tmp_path, "--port", str(port), VOUCHSAFE_LOG_FORMAT="json") as process:
            _, said = process.communicate(timeout=60)
    (line,) = said.splitlines()
    record = json.loads(line)
    assert record["level"] == "CRITICAL"
    assert record["message"].startswith(f"cannot listen on 127.0.0.1 port {port}: ")


def test_it_says_when_it_is_ready_and_libraries_say_nothing(tmp_path: Path) -> None:
    """With port 0 the line has the port it got; once it is there, /readyz is 200."""
    with serve(tmp_path, "--port", "0", VOUCHSAFE_DATA_DIR="data") as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if ready := READY.fullmatch(line):
                break
        assert ready is not None, lines
        assert httpx.get(f"{ready[1]}/readyz", timeout=60).status_code == 200
        process.terminate()
        lines += process.stderr
        assert process.wait(60) == 0
    assert ready[2] == str(tmp_path / "data")
    assert all(line.startswith("INFO vouchsafe") for line in lines), lines
    for said in ("networks run by ", "ready at "):
        assert len([line for line in lines if said in line]) == 1


def test_a_fleets_process_says_so_once_it_listens(tmp_path: Path) -> None:
    """It waits for no worker and no Redis: it can be asked, and says how things stand."""
    data = str(tmp_path / "data")
    with serve(
        tmp_path,
        *("--port", "0"),
        program=WITHOUT_TORCH,
        VOUCHSAFE_DATA_DIR=data,
        **FORMS["fleet"],
    ) as process:
        assert process.stderr is not None
        ready = next(filter(None, map(READY.fullmatch, process.stderr)), None)
        assert ready is not None
        assert ready[2] == data
        assert httpx.get(f"{ready[1]}/livez", timeout=60).status_code == 200


async def test_many_tasks_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line names five tasks, by id and name, and counts the rest; the record has all ids."""
    names = {"default": "nano", "a": "Pets", "b": "", "c": "", "d": "", "e": "", "f": ""}

    class Tasks(dict[str, SimpleNamespace]):
        async def refresh(self) -> None:
            self.update({task: SimpleNamespace(name=name) for task, name in names.items()})

    waits = iter([Condition(False, "not yet"), Condition(False, "not yet"), Condition(True)])

    async def ready() -> Condition:
        return next(waits)

    app, server = FastAPI(), DrainingServer("127.0.0.1", 0)
    app.state.services = SimpleNamespace(
        health=SimpleNamespace(ready=ready), predictions=SimpleNamespace(tasks=Tasks())
    )
    with caplog.at_level(logging.INFO, "vouchsafe"):
        await asyncio.wait_for(cli._announce(Settings(data_dir=tmp_path), server, app), 30)
    server.close()
    (record,) = caplog.records
    assert "tasks: default (nano), a (Pets), b, c, d and 2 more; data" in record.message
    assert record.__dict__["tasks"] == list(names)
    assert next(waits, None) is None


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])  # noqa: S104
def test_the_address_that_is_shown_can_be_asked(host: str, shown: str) -> None:
    """Where a server listens on every address, the line names one that it answers."""
    server = DrainingServer(host, 0)
    assert server.url == f"http://{shown}:{server.port}"
    server.close()


@pytest.mark.parametrize("host", ["...", "a" * 70])
def test_a_host_that_cannot_be_is_an_error_of_one_line(host: str) -> None:
    """A name that no host can have is refused as an address is."""
    with pytest.raises(OSError, match=f"cannot listen on {re.escape(host)} port 0: no host can"):
        DrainingServer(host, 0)
