"""A fleet on one machine: Redis, API processes and workers, each a separate process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx
import redis
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import VOUCHSAFE, free_port, serving

START_SECONDS = 20
WORKER = (VOUCHSAFE[0], "worker")


@dataclass(frozen=True, slots=True)
class Running:
    """A process of the fleet and its URL."""

    url: str
    process: subprocess.Popen[bytes]

    def resident_mib(self) -> float:
        """The memory it holds now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 1)

    def cpu_seconds(self) -> float:
        """What all its threads have spent on a core so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples of that name, whatever their labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        )


@contextmanager
def redis_server(folder: Path) -> Iterator[Running]:
    """A redis-server with an append-only file, once it answers; killed at the end.

    Raises FileNotFoundError where none is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen(  # noqa: S603
        ["redis-server", *flags],  # noqa: S607
        stdout=subprocess.DEVNULL,
    )
    running = Running(f"redis://127.0.0.1:{port}/0", process)
    try:
        _until_answers(running)
        yield running
    finally:
        process.kill()
        process.wait()


def _until_answers(running: Running) -> None:
    deadline = time.monotonic() + START_SECONDS
    with redis.Redis.from_url(running.url, retry=None) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline or running.process.poll() is not None:
                    raise
                time.sleep(0.02)


@contextmanager
def api_process(
    folder: Path, redis_url: str, log: BinaryIO | None = None, **settings: object
) -> Iterator[Running]:
    """`vouchsafe serve` over that Redis, ready."""
    given = {"redis_url": redis_url, **settings}
    with serving(folder, log=log, settings=given) as (url, process):
        yield Running(url, process)


@contextmanager
def worker_process(
    folder: Path,
    redis_url: str,
    cores: Collection[int] | None = None,
    command: Sequence[str] = WORKER,
    log: BinaryIO | None = None,
    **settings: object,
) -> Iterator[Running]:
    """`vouchsafe worker` on all cores or on those, once it serves the default task."""
    given = {"redis_url": redis_url, "run_adaptation_jobs": False, **settings}
    variables = {}
    if cores is not None:
        variables["OMP_NUM_THREADS"] = str(len(cores))
        command = ("taskset", "--cpu-list", ",".join(map(str, cores)), *command)
    with serving(folder, command, log=log, settings=given, variables=variables) as (url, process):
        yield Running(url, process)
