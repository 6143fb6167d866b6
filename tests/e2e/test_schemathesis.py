"""The interface against its own description: schemathesis sends what the description allows."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

import pytest

from tests.support.listening import listening
from tests.support.serving import Service

VERSION = "4.32.5"
CASES = 60
"""Generated requests of each call and phase; some 40 calls make more than 2,000 in all."""


@pytest.mark.long
def test_no_request_breaks_the_service(tmp_path: Path) -> None:
    """No generated request gets a 500, or a status that the description lacks."""
    venv.create(tmp_path / "environment", with_pip=True)
    programs = tmp_path / "environment" / "bin"
    install = [programs / "pip", "install", "-q", f"schemathesis=={VERSION}"]
    subprocess.run(install, check=True, timeout=600)  # noqa: S603
    with listening(Service(data_dir=tmp_path / "data")) as running:
        command = [
            programs / "schemathesis", "run", f"{running.url}/openapi.json", "--url", running.url,
            "--checks", "not_a_server_error,status_code_conformance", "--seed", "1",
            "--max-examples", str(CASES), "--continue-on-failure",
        ]  # fmt: skip
        done = subprocess.run(  # noqa: S603
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=3000
        )
    assert done.returncode == 0, done.stdout[-8000:]
