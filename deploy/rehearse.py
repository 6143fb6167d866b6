"""A rehearsal of the deployment on this machine: `python -m deploy.rehearse`.

1. Starts the processes of the compose file and Prometheus, with the deployed settings
   (deploy/one_host.py): redis-server, the API, a worker, and one that also runs adaptation jobs.
2. Requests predictions and a task from the API. Checks that Prometheus counts them and that every
   query of the dashboard has a value.
3. Kills the workers, then Redis. Each time the expected alerts must fire, no others, and end.

Prints each step. Exits with 1 if a check fails. Needs redis-server and prometheus.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks.fleet import RunningWorker, picture
from deploy.expected import COUNTED, EMPTY, STEADY
from deploy.monitoring.panels import ROWS, filled_in
from deploy.one_host import OneHost, Prometheus, Report, missing

T = TypeVar("T")
LIMIT_SECONDS = 300.0
TASK = {"labels": ["cat", "dog"], "shots": 1, "steps": 1, "epochs": 0, "name": "rehearsed"}
"""The smallest adaptation: half a minute of one core."""


class NotSo(Exception):
    """A check failed; the message has what was checked, and the value."""


def until(
    report: Report, what: str, look: Callable[[], T], holds: Callable[[T], object] = bool
) -> T:
    """Return the first value of `look` that `holds`; raises NotSo after five minutes."""
    began = time.monotonic()
    while not holds(seen := look()):
        if time.monotonic() - began > LIMIT_SECONDS:
            raise NotSo(f"{what}: {seen} after {LIMIT_SECONDS:g} s")
        time.sleep(0.2)
    report(f"so         {what}: {seen} ({time.monotonic() - began:.1f} s)")
    return seen


class Rehearsal:
    """One run, in order: `begin`, `work`, `lose_workers`, `recover`, `lose_redis`, `end`."""

    def __init__(self, folder: Path, scale: float, report: Report, stack: ExitStack) -> None:
        self._report, self._stack = report, stack
        self._host = OneHost(folder, report)
        self._until = partial(until, report)
        self._started: dict[str, tuple[RunningWorker, str]] = {}
        self.logs: list[Path] = []
        self._stack.enter_context(self._host.redis())
        self._prometheus = Prometheus(folder / "prometheus", self._host, scale)

    def begin(self) -> None:
        """Start all processes; wait until all are scraped and every rule is evaluated."""
        for service in ("api", "worker-cpu", "adaptation-cpu"):
            self._start(service)
        for service in self._started:
            self._ready(service)
        key = (self._host.secrets / "api_keys").read_text().split(":")[1].split()[0]
        self._client = httpx.Client(
            base_url=self._started["api"][0].url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=LIMIT_SECONDS,
        )
        self._stack.enter_context(self._client)
        self._stack.enter_context(self._prometheus.running())
        self._is("sum(up)", 3, "processes scraped")
        self._until("rules that are well", self._sound_rules)
        self._before = self._counted()

    def work(self) -> None:
        """Request predictions and a task; check the metrics, the dashboard and the alerts."""
        made = self._client.post("/tasks", json=TASK).raise_for_status()
        refused = self._ask(headers={"Authorization": "Bearer wrong"}).status_code
        self._must("a question with a wrong key", refused, 401)
        queued = [self._ask(n="400", headers={"Prefer": "respond-async"}) for _ in range(3)]
        self._must("questions queued", [one.status_code for one in queued], [202] * 3)
        answers = [self._ask(index=at, mode="predict").json() for at in range(3)]
        self._report(f"seen       answers: {[each['label'] for each in answers]}")
        for one in queued:
            job = partial(self._get, f"/jobs/{one.json()['id']}")
            state = self._until("a queued question", lambda: job()["state"], _has_ended)  # noqa: B023
            self._must("its end", state, "succeeded")
        task = partial(self._get, made.headers["Location"])
        self._must("the task", self._until("task", lambda: task()["state"], _has_ended), "ready")
        self._task = task()["id"]
        answer = self._ask(task=self._task)
        self._must("a question to the task", answer.status_code, 200)
        self._report(f"seen       it answers: {answer.json()['label']}")
        self._moved()
        for what, (query, value) in STEADY.items():
            self._is(query, value, what)
        self._shown()
        self._must("alerts that fire", sorted(self._prometheus.alerts()), [])

    def lose_workers(self) -> None:
        """Kill a worker, so that one alert pends, then the other: the expected alerts fire."""
        lost = [self._kill("worker-cpu")]
        pending = partial(self._prometheus.alerts, "pending")
        first = [f"VouchsafeNotScraped {lost[0]}"]
        self._until("alerts that pend", lambda: sorted(pending()), lambda names: names == first)
        self._must("a question to the other worker", self._ask(mode="predict").status_code, 200)
        lost.append(self._kill("adaptation-cpu"))
        self._fires([*(f"VouchsafeNotScraped {one}" for one in lost), "VouchsafeNoWorker"])
        answer = self._ask(mode="predict")
        self._must("a question without workers", answer.status_code, 503)
        self._report(
            f"seen       {answer.json()['type']}, Retry-After: {answer.headers['Retry-After']}"
        )
        for instance in lost:
            self._prometheus.leave(instance)

    def recover(self) -> None:
        """Start a worker again; the alerts end, and both tasks are served."""
        self._start("adaptation-cpu")
        self._ready("adaptation-cpu")
        self._is("max(vouchsafe_workers)", 1, "workers")
        self._fires([])
        for task in ("default", self._task):
            status = self._ask(mode="predict", task=task).status_code
            self._must(f"a question to task {task}", status, 200)

    def lose_redis(self) -> None:
        """Kill Redis; its alert fires, and no alert whose metrics are NaN meanwhile."""
        self._host.kill_redis()
        self._report("killed     redis")
        self._fires(["VouchsafeRedisDown"])
        answer = self._ask(mode="predict")
        self._must("a question without Redis", answer.status_code, 503)
        self._report(f"seen       {answer.json()['type']}")
        self._host.start_redis()
        self._report("started    redis")
        self._fires([])
        self._until("a question, retried after a 503", self._answered)

    def end(self) -> None:
        """Check that each process exits with 0 after SIGTERM."""
        for service in ("api", "adaptation-cpu"):
            process = self._started[service][0]
            process.process.send_signal(signal.SIGTERM)
            self._must(f"{service} after SIGTERM exits with", process.ends(), 0)

    def _answered(self) -> bool:
        """Return whether a prediction succeeds; it is a 503 until a worker has reconnected."""
        status = self._ask(mode="predict").status_code
        if status not in (200, 503):
            raise NotSo(f"a question: {status}, not 200, nor 503 for a while")
        return status == 200

    def _start(self, service: str) -> None:
        name = f"{service}-{len(self.logs)}"
        process = self._stack.enter_context(self._host.running(service, name))
        self.logs.append(process.log)
        self._started[service] = process, self._prometheus.follow(service, process)
        self._report(f"started    {name}: {process.url}, process {process.process.pid}")

    def _ready(self, service: str) -> None:
        process, began = self._started[service][0], time.monotonic()
        process.until(process.ready, LIMIT_SECONDS)
        self._report(f"so         {service} is ready ({time.monotonic() - began:.1f} s)")

    def _kill(self, service: str) -> str:
        process, instance = self._started[service]
        process.process.kill()
        process.ends()
        self._report(f"killed     {service}, {instance}")
        return instance

    def _fires(self, names: list[str]) -> None:
        """Wait until exactly these alerts fire; raises NotSo if another fires meanwhile."""

        def firing() -> list[str]:
            found = sorted(self._prometheus.alerts())
            if names and (strange := set(found) - set(names)):
                raise NotSo(f"alerts that must not fire: {sorted(strange)}")
            return found

        self._until("alerts that fire", firing, lambda found: found == sorted(names))
        for name, alert in self._prometheus.alerts().items():
            notes = alert["annotations"]
            self._report(f"seen       {name}: {notes['summary']}. {notes['description']}")

    def _sound_rules(self) -> int:
        """Return the number of rules, or 0 until all are evaluated; raises NotSo if one fails."""
        rules = self._prometheus.rules()
        if bad := [rule["name"] for rule in rules if rule["health"] == "err"]:
            raise NotSo(f"rules that Prometheus cannot evaluate: {bad}")
        return len(rules) if all(rule["health"] == "ok" for rule in rules) else 0

    def _counted(self) -> dict[str, float]:
        return {what: self._prometheus.value(query) for what, query in COUNTED.items()}

    def _moved(self) -> None:
        """Check that every count of COUNTED has grown."""

        def unmoved() -> list[str]:
            now = self._counted()
            return [what for what in COUNTED if not now[what] > self._before[what]]

        self._until("counts that have not moved", unmoved, lambda left: not left)
        for what, value in self._counted().items():
            self._report(f"seen       {what}: {self._before[what]:g} -> {value:g}")

    def _shown(self) -> None:
        """Check that every query of the dashboard has a value."""
        panels = [panel for row in ROWS.values() for panel in row if panel.title not in EMPTY]

        def blank() -> list[str]:
            return [
                panel.title
                for panel in panels
                for query in panel.queries.values()
                if not self._prometheus.samples(filled_in(query))
            ]

        self._until("panels with nothing to show", blank, lambda found: not found)

    def _ask(
        self, *, index: int = 0, headers: Mapping[str, str] | None = None, **fields: str
    ) -> httpx.Response:
        rows = {"n": "60"} if fields.get("mode") == "predict" else {"n0": "20", "n": "60"}
        files = {"image": picture(index)}
        return self._client.post("/predict", files=files, data={**rows, **fields}, headers=headers)

    def _get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get(path).raise_for_status().json()
        return found

    def _is(self, query: str, wanted: float, what: str) -> None:
        """Wait until the query has this value."""
        self._until(what, partial(self._prometheus.value, query), lambda seen: seen == wanted)

    def _must(self, what: str, seen: object, wanted: object) -> None:
        if seen != wanted:
            raise NotSo(f"{what}: {seen}, not {wanted}")
        self._report(f"so         {what}: {seen}")


def _has_ended(state: str) -> bool:
    return state not in ("queued", "running")


def rehearse(folder: Path, scale: float, report: Report) -> None:
    """Run the rehearsal; raises NotSo, and RuntimeError if a process ends early."""
    with ExitStack() as stack:
        rehearsal = Rehearsal(folder, scale, report, stack)
        try:
            for act in ("begin", "work", "lose_workers", "recover", "lose_redis", "end"):
                getattr(rehearsal, act)()
        except Exception:
            for log in rehearsal.logs:
                report(f"log        {log.parent.name}: {log.read_text()[-2_000:]}")
            raise


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.1, help="of every `for` (%(default)s)")
    arguments = parser.parse_args()
    if absent := missing():
        raise SystemExit(f"not installed: {', '.join(absent)}")
    began = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f}  {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        try:
            rehearse(Path(folder), arguments.scale, report)
        except (NotSo, RuntimeError, TimeoutError, httpx.HTTPError) as error:
            print(f"NOT SO: {error}", file=sys.stderr)
            raise SystemExit(1) from error
    report("all is as it must be")


if __name__ == "__main__":
    main()
