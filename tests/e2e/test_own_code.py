"""The example package of docs/own-code.md: installed from its page, added and served."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.server import serving
from tests.support.paths import ROOT
from tests.support.photographs import png

PAGE = (ROOT / "docs" / "own-code.md").read_text()
VOUCHSAFE = str(Path(sys.executable).with_name("vouchsafe"))


def block(language: str) -> str:
    """The page's one block of code in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process in whose path the example is installed; nothing is fetched."""
    root = tmp_path_factory.mktemp("example")
    package, target = root / "vouchsafe-example", root / "target"
    package.mkdir()
    (package / "pyproject.toml").write_text(block("toml"))
    (package / "vouchsafe_example.py").write_text(block("python"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run(  # noqa: S603
        [*pip, "--no-build-isolation", "--target", str(target), str(package)], check=True
    )
    paths = [str(target), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_the_example_has_thirty_lines() -> None:
    """What the page says of its length is so."""
    written = [line for line in (block("toml") + block("python")).splitlines() if line]
    assert len(written) <= 30


def test_the_example_is_served(installed: dict[str, str], tmp_path: Path) -> None:
    """The page's own commands make a task of the package's kinds; a server certifies with it."""
    (tmp_path / "labels.txt").write_text("dark\nbright\n")
    (line,) = re.findall(r"^vouchsafe (models add .*)$", PAGE, re.MULTILINE)
    variables = {**installed, "VOUCHSAFE_DATA_DIR": str(tmp_path / "data")}
    environment = {**os.environ, **variables}
    subprocess.run([VOUCHSAFE, *line.split()], env=environment, cwd=tmp_path, check=True)  # noqa: S603
    with serving(tmp_path / "data", variables=installed) as (url, _):
        answer = httpx.post(
            f"{url}/predict",
            files={"image": png(4)},
            data={"task": "light", "n": 100, "n0": 10},
            headers={"Prefer": "wait=120"},
            timeout=120,
        ).json()
    assert answer["label"] in ("dark", "bright")
    assert answer["certified"] is True
    assert "vouchsafe-example 1.0" in json.dumps(answer["certificate"])


def test_a_machine_without_the_package_names_the_kind(
    installed: dict[str, str], tmp_path: Path
) -> None:
    """Where the package is not installed, its task is refused by the kind that is unknown."""
    (tmp_path / "labels.txt").write_text("dark\nbright\n")
    environment = {**os.environ, "VOUCHSAFE_DATA_DIR": str(tmp_path / "data")}
    words = "models add light --classifier brightness --labels labels.txt --resolution 32"
    subprocess.run(  # noqa: S603
        [VOUCHSAFE, *words.split()], env={**environment, **installed}, cwd=tmp_path, check=True
    )
    verified = subprocess.run(  # noqa: S603
        [VOUCHSAFE, "models", "verify", "light"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 1
    assert "the classifier is 'brightness', not of onnx" in " ".join(verified.stderr.split())
    assert json.loads((tmp_path / "data/tasks/light/manifest.json").read_text())["files"] == {}
