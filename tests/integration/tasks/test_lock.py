"""The lock files and the Makefile: which releases of Python they install on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.paths import ROOT

RELEASES = ("3.11.0", "3.11.2", "3.11.4", "3.12.0", "3.13.0")
INTERPRETER = """#!{python}
import sys
sys.version_info = {version}
if sys.argv[1] == "-c":
    exec(sys.argv[2])
sys.exit(f"reached {{sys.argv[1:]}}")
"""


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / lock).read_text().splitlines()
    found = (tuple(line.split("==")) for line in lines if "==" in line and not line.startswith(" "))
    return dict(found)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-api.lock"])
def test_every_pin_installs_on_every_supported_python(lock: str) -> None:
    """No pin's Requires-Python excludes a supported release, be it the first of its series."""
    assert len(pins(lock)) > 30
    for name, version in pins(lock).items():
        installed = distribution(name)
        assert installed.version == version, f"{name}: install {lock} first"
        admitted = SpecifierSet(installed.metadata["Requires-Python"] or "")
        excluded = [release for release in RELEASES if release not in admitted]
        assert excluded == [], f"{name}=={version} asks for Python {admitted}"


def test_the_locks_agree() -> None:
    """The API's lock file pins no other release than the whole one's."""
    assert pins("requirements-api.lock").items() <= pins("requirements.lock").items()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ((2, 7, 18), False),
        ((3, 10, 13), False),
        ((3, 11, 0), True),
        ((3, 12, 1), True),
        ((3, 13, 9), True),
        ((3, 14, 0), False),
    ],
)
def test_make_refuses_other_pythons_in_one_line(
    tmp_path: Path, version: tuple[int, ...], taken: bool
) -> None:
    """Only an interpreter that pyproject.toml admits makes the virtual environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (".".join(map(str, version)) in SpecifierSet(project["requires-python"])) is taken
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable, version=version))
    interpreter.chmod(0o755)
    ended = make(tmp_path, f"PYTHON={interpreter}")
    refusal = f"{interpreter} is not Python 3.11, 3.12 or 3.13: make setup PYTHON="
    assert ended.returncode == 2
    assert ("reached ['-m', 'venv', '.venv']" in ended.stderr) is taken
    assert ended.stdout.startswith(refusal) is not taken
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_that_there_is_no_such_interpreter(tmp_path: Path) -> None:
    """An interpreter that is not there is refused like one of another release."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ended = make(tmp_path, "PYTHON=/nowhere/python3")
    assert ended.stdout.startswith("/nowhere/python3 is not Python 3.11, 3.12 or 3.13")


def make(folder: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in a folder, whatever make this test itself was started by."""
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    return subprocess.run(  # noqa: S603
        ["make", "setup", *variables],  # noqa: S607
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
