"""What is installed is this very clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.support.paths import ROOT


def test_installed_packages_lie_in_this_clone() -> None:
    """An environment that several clones share runs the code of this one."""
    code = (
        "import models, service, vouchsafe\n"
        "print(models.__file__, service.__file__, vouchsafe.__file__, sep='\\n')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(  # noqa: S603
        command, cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    expected = [ROOT / name / "__init__.py" for name in ("models", "service", "service/client")]
    assert [Path(line) for line in run.stdout.split()] == expected


def test_every_package_is_installed() -> None:
    """pyproject.toml lists each package of the tree, and the client's second name."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = [file for top in ("models", "service") for file in (ROOT / top).rglob("__init__.py")]
    found = [".".join(file.parent.relative_to(ROOT).parts) for file in files]
    assert sorted(listed) == sorted([*found, "vouchsafe"])
