"""`vouchsafe evaluate`, killed in the middle of a run and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.paths import ROOT

CODE = "import sys; from service.cli.main import app; app(sys.argv[1:])"
OPTIONS = ("evaluate", "--limit", "12", "--n0", "10", "--n", "150")


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VOUCHSAFE_DATA_DIR": str(folder / "d")}
    command = [sys.executable, "-c", CODE, *OPTIONS, "--out", out]
    return subprocess.Popen(  # noqa: S603
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def log(file: Path) -> list[list[str]]:
    """Lines of the log without their times."""
    return [line.split("\t")[:5] for line in file.read_text().splitlines()]


def test_a_killed_run_goes_on_to_the_same_results(tmp_path: Path) -> None:
    """SIGKILL after some images: the same command ends with the log of a run that was not killed,
    and keeps what it had.
    """
    file = tmp_path / "killed" / "default-0.25.tsv"
    run = start(tmp_path, "killed")
    while run.poll() is None and (not file.exists() or len(log(file)) < 3):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = file.read_text().splitlines()
    assert 3 <= len(before) < 13
    assert start(tmp_path, "killed").wait() == 0
    assert start(tmp_path, "whole").wait() == 0
    assert log(file) == log(tmp_path / "whole" / "default-0.25.tsv")
    assert file.read_text().splitlines()[: len(before) - 1] == before[:-1]
