"""The wheel, installed into an empty environment without torch: the Python client works there."""

from __future__ import annotations

import os
import re
import subprocess
import venv
from pathlib import Path

import pytest

from tests.support.documents import README
from tests.support.listening import listening
from tests.support.paths import ROOT
from tests.support.serving import Service
from tests.support.wheels import build_wheel


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A finished command without this project's paths in its environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(  # noqa: S603
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel; needs a package index."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder)
    venv.create(folder / "environment", with_pip=True)
    found = folder / "environment" / "bin" / "python"
    installed = run(found, "-m", "pip", "install", "-q", wheel, cwd=folder)
    if installed.returncode:
        reason = f"the wheel's packages could not be installed: {installed.stderr[-500:]}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return found


def test_the_client_works_without_torch(python: Path, tmp_path: Path) -> None:
    """README's snippet gets its answer, which is verified there; torch is missing."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    with listening(Service(data_dir=tmp_path / "data")) as running:
        code = f"{snippet}print(Client('http://127.0.0.1:8000').verify(answer)['passed'])\n"
        code = code.replace("http://127.0.0.1:8000", running.url)
        asked = run(python, "-c", code, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr
    label, _, passed = asked.stdout.split()
    assert (label, passed) == ("cat", "True")
    assert "No module named 'torch'" in run(python, "-c", "import torch", cwd=tmp_path).stderr


def test_the_command_is_there(python: Path, tmp_path: Path) -> None:
    """`vouchsafe` checks a certificate in that environment."""
    certificate = ROOT / "docs" / "examples" / "certificate.json"
    checked = run(python.parent / "vouchsafe", "verify", certificate, cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "statistics" in checked.stdout
