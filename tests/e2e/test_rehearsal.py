"""deploy/rehearse.py: the processes of the compose file, and what Prometheus makes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy import rehearse
from deploy.one_host import OneHost, duration
from tests.support.paths import ROOT


def test_deployment_is_as_rehearsed(redis_program: None, prometheus_programs: None) -> None:
    """Questions and a task move the metrics, no alert fires, and killed workers raise theirs."""
    command = [sys.executable, "-m", "deploy.rehearse"]
    ended = subprocess.run(  # noqa: S603
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1_500
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith("all is as it must be\n")
    assert "VouchsafeNoWorker: No worker is alive" in ended.stdout


def test_what_is_not_so_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that never holds is an error with what was seen instead."""
    monkeypatch.setattr(rehearse, "LIMIT_SECONDS", 0.0)
    with pytest.raises(rehearse.NotSo, match="two workers: 1 after 0 s"):
        rehearse.until(print, "two workers", lambda: 1, lambda seen: seen == 2)


def test_settings_are_the_deployed_ones(tmp_path: Path) -> None:
    """Settings come from the compose file's environment files; only places differ, and are told."""
    told: list[str] = []
    settings = OneHost(tmp_path, told.append).settings("api")
    deployed = (ROOT / "docker" / "env" / "common.env").read_text()
    assert f"VOUCHSAFE_LEASE_SECONDS={settings['lease_seconds']}\n" in deployed
    assert settings["api_keys_file"] == str(tmp_path / "secrets" / "api_keys")
    places = [name for name, value in settings.items() if str(tmp_path) in value]
    assert len(told) == len(places)
    for name in places:
        assert any(f"VOUCHSAFE_{name.upper()}: /" in line for line in told)


def test_durations_are_read() -> None:
    """A duration as Prometheus writes it, in seconds."""
    assert [duration(text) for text in ("90s", "1m", "1h30m", "250ms")] == [90, 60, 5_400, 0.25]
