"""Secrets and settings of a deployment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

SECRETS = {
    "noise.secret",
    "signing.key",
    "api_keys",
    "prometheus_api_key",
    "vouchsafe_redis_url",
    "redis_admin_password",
    "redis_users.acl",
    "grafana_admin_password",
}


def make_secrets(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script on a folder."""
    command = [sys.executable, str(ROOT / "docker" / "make_secrets.py"), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603


def variables(file: Path) -> dict[str, str]:
    """An environment file's."""
    lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)
