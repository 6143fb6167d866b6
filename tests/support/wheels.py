"""The project's wheel, built from a copy, so that nothing is left in the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def build_wheel(folder: Path) -> Path:
    """The wheel, in this folder; needs no index."""
    source = folder / "source"
    source.mkdir()
    for name in ("models", "service"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, capture_output=True, check=True)  # noqa: S603
    (wheel,) = folder.glob("*.whl")
    return wheel
