"""What is installed is this very clone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def test_installed_packages_lie_in_this_clone() -> None:
    """An environment that several clones share runs the code of this one."""
    code = "import models, service; print(models.__file__, service.__file__, sep='\\n')"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(  # noqa: S603
        command, cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    expected = [ROOT / name / "__init__.py" for name in ("models", "service")]
    assert [Path(line) for line in run.stdout.split()] == expected
