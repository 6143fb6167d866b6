"""Networks of one's own, added while processes run: served by one process, and by a fleet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.fleet import worker_process
from benchmarks.redis_server import RedisServer
from benchmarks.server import serving
from tests.support import own_networks
from tests.support.paths import ROOT
from tests.support.photographs import png

VOUCHSAFE = str(Path(sys.executable).with_name("vouchsafe"))
SECONDS = 120


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A folder of transformers."""
    return own_networks.save_vit(tmp_path / "vit")


def add(data: Path, vit: Path) -> None:
    """`vouchsafe models add` in a process of its own."""
    command = [VOUCHSAFE, "models", "add", "mine", "--classifier", f"transformers:{vit}"]
    environment = {**os.environ, "VOUCHSAFE_DATA_DIR": str(data)}
    subprocess.run([*command, "--denoiser", "nano"], env=environment, check=True, cwd=ROOT)  # noqa: S603


def certified(url: str) -> dict[str, Any]:
    """The answer of the task `mine`, once the server serves it."""
    deadline = time.monotonic() + SECONDS
    while True:
        answer = httpx.post(
            f"{url}/predict",
            files={"image": png(4)},
            data={"task": "mine", "n": 60, "n0": 10},
            headers={"Prefer": f"wait={SECONDS}"},
            timeout=SECONDS,
        )
        if answer.status_code == 200:
            told: dict[str, Any] = answer.json()
            return told
        assert answer.status_code in (404, 409, 503), answer.text
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.2)


def test_a_running_server_serves_what_is_added(tmp_path: Path, vit: Path) -> None:
    """A ViT that is added while the server runs answers, with a certificate, without a restart."""
    with serving(tmp_path / "data") as (url, _):
        add(tmp_path / "data", vit)
        told = certified(url)
        assert told["resolution"] == 32
        assert {count["label"] for count in told["counts"]} <= set(own_networks.NAMES)
        models = httpx.get(f"{url}/models").json()
    assert "mine" in str(models)


def test_a_running_fleet_serves_what_is_added(
    tmp_path: Path, vit: Path, own_server: RedisServer
) -> None:
    """An API process and a worker on one volume serve a ViT that is added while they run."""
    data = tmp_path / "data"
    options = {"redis_url": own_server.url}
    with (
        serving(data, probe="/livez", settings=options) as (url, _),
        worker_process(tmp_path / "worker", own_server.url, data_dir=data) as worker,
    ):
        worker.until(worker.ready)
        add(data, vit)
        told = certified(url)
        assert told["rows_used"] == 70
        assert worker.process.poll() is None
