"""`vouchsafe serve` as a separate process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import httpx

START_SECONDS = 120
VOUCHSAFE = (str(Path(sys.executable).with_name("vouchsafe")), "serve")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    data_dir: Path,
    command: Sequence[str] = VOUCHSAFE,
    probe: str = "/readyz",
    log: BinaryIO | None = None,
    settings: Mapping[str, object] = MappingProxyType({}),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and process of a server on a free port, once `probe` succeeds.

    `settings` are those of `service.config` by name; without `api_keys` every caller is accepted.
    `variables` are further environment variables. Its output goes to `log`, if given. The process
    is killed at the end if it still runs.

    Raises RuntimeError where it ends before it is ready and TimeoutError where that takes too long.
    """
    port = free_port()
    others = {name: value for name, value in os.environ.items() if "VOUCHSAFE_API_KEYS" not in name}
    given = {f"VOUCHSAFE_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(  # noqa: S603
        [*command, "--port", str(port)],
        env={**others, "VOUCHSAFE_DATA_DIR": str(data_dir), **given, **variables},
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _until_ready(url + probe, process)
        yield url, process
    finally:
        process.kill()
        process.wait()


def _until_ready(probe: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError("the server ended before it was ready")
        try:
            if httpx.get(probe).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the server was not ready in time")
