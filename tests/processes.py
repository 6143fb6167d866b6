"""`vouchsafe serve` as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


VOUCHSAFE = (str(Path(sys.executable).with_name("vouchsafe")), "serve")


@contextmanager
def serving(
    data_dir: Path, command: Sequence[str] = VOUCHSAFE, probe: str = "/readyz"
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on a free port, ready or as far as another probe says.

    Killed at the end where the test did not stop it.
    """
    port = free_port()
    process = subprocess.Popen(  # noqa: S603
        [*command, "--port", str(port)],
        env={**os.environ, "VOUCHSAFE_DATA_DIR": str(data_dir)},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until_ready(url + probe, process)
        yield url, process
    finally:
        process.kill()
        process.wait()


def until_ready(probe: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(probe).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("the server was not ready in time")
