"""The fleet of the compose file as processes of one machine, with its settings, and Prometheus.

The environment files, redis.conf, the secrets, prometheus.yml and alerts.yml are the deployed ones.
Every difference that one machine needs is reported, one line each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.fleet import VOUCHSAFE, RunningWorker, worker_process
from benchmarks.redis_server import RedisServer
from benchmarks.server import free_port

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "deploy" / "monitoring"
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
INTERVALS = {"scrape_interval": "4s", "evaluation_interval": "1s"}
"""Prometheus's intervals here. A scrape may take that long, and takes 2 s while Redis is down."""
PROGRAMS = ("redis-server", "prometheus")
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = {
    "api": ("vouchsafe-api", (VOUCHSAFE[0], "serve"), 8000),
    "worker-cpu": ("vouchsafe-worker", VOUCHSAFE, 9000),
    "adaptation-cpu": ("vouchsafe-worker", VOUCHSAFE, 9000),
}
"""Services of the compose file: their job in Prometheus, command, and port in the container."""

Report = Callable[[str], None]


class OneHost:
    """Processes of one machine: `folder` has their /run/secrets, /var/lib/vouchsafe and /data."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.secrets = folder / "secrets"
        self.data = folder / "data"
        self._folder, self._report = folder, report
        self._options: dict[str, str] = {}
        self._otherwise: set[str] = set()
        self._server: RedisServer
        self._places = {"/run/secrets": self.secrets, "/var/lib/vouchsafe": self.data}

    def here(self, value: str, named: str) -> str:
        """Return a setting's value on this machine; reports a change."""
        found = value
        for place, folder in self._places.items():
            found = re.sub(rf"^{place}(?=/|$)", str(folder), found)
        if found != value:
            self.otherwise(named, value, found)
        return found

    def otherwise(self, named: str, value: object, here: object) -> None:
        """Report, once, a difference from the deployment."""
        if (line := f"otherwise  {named}: {value} -> {here}") not in self._otherwise:
            self._otherwise.add(line)
            self._report(line)

    def settings(self, service: str) -> dict[str, str]:
        """Return the service's settings by name, from its environment files."""
        found = {}
        for name in COMPOSE["services"][service]["env_file"]:
            for variable, value in _variables((ROOT / name).read_text()).items():
                setting = variable.removeprefix("VOUCHSAFE_").lower()
                found[setting] = self.here(value, f"{service}, {Path(name).name}, {variable}")
        return found

    def make_secrets(self, redis: str) -> None:
        """Make the secrets as an operator does; here one user reads them all."""
        program = ROOT / "docker" / "make_secrets.py"
        command = [sys.executable, str(program), str(self.secrets), "--redis", redis]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603
        if os.geteuid() == 0:
            for path in self.secrets.iterdir():
                os.chown(path, 0, 0)
            self.otherwise("owners of the secrets", "a user each", "one user, who runs everything")

    @contextmanager
    def redis(self) -> Iterator[None]:
        """Run redis-server with redis.conf and the ACL file, after making the secrets."""
        place = self._folder / "redis"
        place.mkdir()
        server = self._server = RedisServer(place)
        port = str(free_port())
        self.make_secrets(f"127.0.0.1:{port}")
        server.url = (self.secrets / "vouchsafe_redis_url").read_text().strip()
        for name, value in _options((ROOT / "docker" / "redis.conf").read_text()).items():
            self._options[name] = self.here(value, f"redis.conf, {name}")
        self.otherwise("redis.conf, port", self._options["port"], port)
        self._options["port"] = port
        try:
            self.start_redis()
            yield
        finally:
            server.kill()

    def start_redis(self) -> None:
        """Start Redis, for the first time or on its files."""
        self._server.start(**self._options)

    def kill_redis(self) -> None:
        """Kill Redis with SIGKILL."""
        self._server.kill()

    @contextmanager
    def running(self, service: str, name: str) -> Iterator[RunningWorker]:
        """Start a process of the service, with its log at `name`; kills it at the end."""
        folder, (_, program, port) = self._folder / name, SERVICES[service]
        command: tuple[str, ...] = program
        settings, described = self.settings(service), COMPOSE["services"][service]
        if threads := described.get("environment", {}).get("OMP_NUM_THREADS"):
            half = max(1, (os.cpu_count() or 2) // 2)  # There are two workers.
            self.otherwise(f"{service}, OMP_NUM_THREADS", threads, half)
            command = ("env", f"OMP_NUM_THREADS={half}", *command)
        with worker_process(folder, None, command, **settings) as process:  # type: ignore[arg-type]
            address = process.url.removeprefix("http://")
            self.otherwise(f"{service}, address", f"0.0.0.0:{port}", address)
            yield process


def _variables(text: str) -> dict[str, str]:
    lines = (line.strip() for line in text.splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _options(text: str) -> dict[str, str]:
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.split(None, 1) for line in lines if line and not line.startswith("#"))
    return {name: value.strip('"') for name, value in pairs}


class Prometheus:
    """A Prometheus with prometheus.yml and alerts.yml, and short intervals.

    `scale` multiplies every `for`, the time that a condition holds before its alert fires.
    Methods raise httpx.HTTPStatusError for an invalid query.
    """

    def __init__(self, folder: Path, host: OneHost, scale: float) -> None:
        folder.mkdir()
        self._folder = folder
        self._targets: dict[str, set[str]] = {}
        self.url = f"http://127.0.0.1:{free_port()}"
        self._write_rules(host, scale)
        self._write_settings(host)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run Prometheus, ready within; kills it at the end.

        Raises RuntimeError if it ends before it is ready.
        """
        program = shutil.which("prometheus") or "prometheus"
        command = [program, f"--config.file={self._folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={self._folder / 'data'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}"]
        log = self._folder / "prometheus.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)  # noqa: S603
        try:
            while not self._is_ready():
                if process.poll() is not None:
                    raise RuntimeError(f"prometheus has ended: {log.read_text()}")
                time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()

    def follow(self, service: str, process: RunningWorker) -> str:
        """Return the `instance` of a process of the service, which is scraped from now on."""
        job, instance = SERVICES[service][0], process.url.removeprefix("http://")
        self._targets.setdefault(job, set()).add(instance)
        self._write_targets()
        return instance

    def leave(self, instance: str) -> None:
        """Stop scraping a process, as when its container is gone."""
        for instances in self._targets.values():
            instances.discard(instance)
        self._write_targets()

    def samples(self, query: str) -> list[dict[str, Any]]:
        """Return the query's current series, each with `metric` and `value`."""
        found = self._get("/api/v1/query", query=query)["result"]
        return [{"metric": one["metric"], "value": float(one["value"][1])} for one in found]

    def value(self, query: str) -> float:
        """Return the query's current value; 0 if it has none."""
        return sum(float(one["value"]) for one in self.samples(query))

    def alerts(self, state: str = "firing") -> dict[str, dict[str, Any]]:
        """Return the alerts in this state, by name and instance."""
        found = [one for one in self._get("/api/v1/alerts")["alerts"] if one["state"] == state]
        named = [
            " ".join((o["labels"]["alertname"], o["labels"].get("instance", ""))) for o in found
        ]
        return {name.strip(): one for name, one in zip(named, found, strict=True)}

    def rules(self) -> list[dict[str, Any]]:
        """Return Prometheus's rules, with their health."""
        return [rule for group in self._get("/api/v1/rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: str) -> dict[str, Any]:
        answer = httpx.get(self.url + path, params=parameters, timeout=30).raise_for_status()
        data: dict[str, Any] = answer.json()["data"]
        return data

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def _write_rules(self, host: OneHost, scale: float) -> None:
        rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = f"{round(1000 * scale * duration(rule['for']))}ms"
        host.otherwise("alerts.yml, every `for`", "as it is", f"times {scale:g}")
        (self._folder / "alerts.yml").write_text(yaml.safe_dump(rules))

    def _write_settings(self, host: OneHost) -> None:
        settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        for name, value in settings["global"].items():
            settings["global"][name] = INTERVALS[name]
            host.otherwise(f"prometheus.yml, {name}", value, INTERVALS[name])
        for job in settings["scrape_configs"]:
            name, found = job["job_name"], job.pop("dns_sd_configs")
            job["file_sd_configs"] = [{"files": [str(self._folder / f"{name}.json")]}]
            names = ", ".join(f"{each}:{one['port']}" for one in found for each in one["names"])
            host.otherwise(f"prometheus.yml, {name}", names, "ports of 127.0.0.1")
            if key := job.get("authorization"):
                key["credentials_file"] = host.here(
                    key["credentials_file"], f"prometheus.yml, {name}"
                )
            self._targets[name] = set()
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self._write_targets()

    def _write_targets(self) -> None:
        for job, instances in self._targets.items():
            path = self._folder / f"{job}.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps([{"targets": sorted(instances)}]))
            partial.replace(path)


def duration(text: str) -> float:
    """Return the seconds of a duration in Prometheus's format, such as `1h30m`."""
    return sum(float(n) * SECONDS[unit] for n, unit in re.findall(r"(\d+)(ms|s|m|h|d)", text))


def missing() -> list[str]:
    """Return the required programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program) is None]
