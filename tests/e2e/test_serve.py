"""`vouchsafe serve` as a process: real weights, real HTTP, real signals."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import serving
from tests.support.photographs import png


async def ask(client: httpx.AsyncClient, index: int, **fields: Any) -> dict[str, Any]:
    answer = await client.post(
        "/predict",
        files={"image": (f"{index}.png", png(index))},
        data=fields,
        headers={"Prefer": "wait=600"},
        timeout=600,
    )
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def metric(text: str, name: str) -> dict[str, float]:
    return {
        str(sample.labels.get("le", sample.labels.get("priority", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


QUESTIONS: list[dict[str, Any]] = [
    {"index": i, "mode": "certify", "n0": 10, "n": 60, "sigma": (0.25, 0.5)[i % 2]}
    if i % 5 < 3
    else {"index": i, "mode": "predict", "n": 20}
    for i in range(50)
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Popen[bytes]]]:
    """One server, by its URL and process, for the tests that only ask."""
    with serving(tmp_path_factory.mktemp("serve") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def server(running: tuple[str, Popen[bytes]]) -> str:
    return running[0]


async def test_fifty_mixed_requests_get_the_counts_they_get_alone(server: str) -> None:
    """Fifty concurrent questions share device batches; every fourth has the counts it has alone."""
    async with httpx.AsyncClient(
        base_url=server, limits=httpx.Limits(max_connections=60)
    ) as client:
        before = metric((await client.get("/metrics")).text, "vouchsafe_batch_jobs_bucket")
        together = await asyncio.gather(*(ask(client, **question) for question in QUESTIONS))
        after = metric((await client.get("/metrics")).text, "vouchsafe_batch_jobs_bucket")
        alone = [await ask(client, **question) for question in QUESTIONS[::4]]
    shared = (after["+Inf"] - after["1.0"]) - (before.get("+Inf", 0) - before.get("1.0", 0))
    assert shared >= 10
    for first, second in zip(together[::4], alone, strict=True):
        assert first["id"] != second["id"]
        assert first["counts"] == second["counts"]
        assert first["radius"] == second["radius"]


async def test_a_ship_is_certified_as_a_ship(server: str) -> None:
    """The first slice image that is called a ship at n = 1000 comes with all that backs it."""
    async with httpx.AsyncClient(base_url=server) as client:
        told = await ask(client, 4, n=200)
    assert told["label"] == "ship"
    assert told["certified"] is True
    assert 0 < told["radius"] < 4 * told["sigma"]
    assert sum(count["count"] for count in told["counts"]) == told["n"] == 200
    assert told["rows_used"] == 300
    assert told["resolution"] == 32


async def test_async_job_reports_progress_and_ends_like_the_waiting_call(server: str) -> None:
    """A 202 job's events end with the very answer that the waiting call gives."""
    async with httpx.AsyncClient(base_url=server, timeout=120) as client:
        accepted = await client.post(
            "/predict",
            files={"image": png(7)},
            data={"n": 400},
            headers={"Prefer": "respond-async"},
        )
        assert accepted.status_code == 202
        events: list[tuple[str, dict[str, Any]]] = []
        kind = ""
        async with client.stream("GET", f"{accepted.headers['location']}/events") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("event:"):
                    kind = line.partition(":")[2].strip()
                elif line.startswith("data:"):
                    events.append((kind, json.loads(line.partition(":")[2])))
        same = await ask(client, 7, n=400)
    assert {kind for kind, _ in events[:-1]} == {"progress"}
    assert events[-1][0] == "result"
    assert events[-1][1]["counts"] == same["counts"]


def test_told_to_stop_it_lets_waiting_callers_go(tmp_path: Path) -> None:
    """SIGTERM while callers wait for long answers: each gets a 503 problem, the process exits 0."""
    with serving(tmp_path / "data") as (url, process), ThreadPoolExecutor(3) as callers:
        waiting = [
            callers.submit(
                httpx.post,
                f"{url}/predict",
                files={"image": png(index)},
                data={"n": "50000"},
                timeout=120,
            )
            for index in range(3)
        ]
        while metric(httpx.get(f"{url}/metrics").text, "vouchsafe_queue_rows")["lo"] < 100_000:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        answers = [answer.result() for answer in waiting]
        assert process.wait(60) == 0
    for answer in answers:
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) >= 1


def test_it_stays_within_its_memory(running: tuple[str, Popen[bytes]]) -> None:
    """Serving certifications takes less than 1.5 GB of resident memory at any time."""
    url, process = running
    answer = httpx.post(f"{url}/predict", files={"image": png(1)}, data={"n": "200"}, timeout=120)
    assert answer.status_code == 200
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) * 1024 < 1.5e9


def test_terminated_under_load_it_exits_0_and_a_restart_gives_the_same_counts(
    tmp_path: Path,
) -> None:
    """SIGTERM amid a long job ends the process with 0; the same question later, the same counts."""
    question = {"n0": "20", "n": "100"}
    with serving(tmp_path / "data") as (url, process):
        first = httpx.post(f"{url}/predict", files={"image": png(3)}, data=question, timeout=120)
        long = {"n": "30000"}
        headers = {"Prefer": "respond-async"}
        for index in range(5):
            accepted = httpx.post(
                f"{url}/predict", files={"image": png(index)}, data=long, headers=headers
            )
            assert accepted.status_code == 202
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with serving(tmp_path / "data") as (url, _):
        second = httpx.post(f"{url}/predict", files={"image": png(3)}, data=question, timeout=120)
    assert first.json()["counts"] == second.json()["counts"]
    assert first.json()["bundle"] == second.json()["bundle"]
