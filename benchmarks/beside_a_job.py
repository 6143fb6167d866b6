"""Latency of predictions beside a running adaptation: `python -m benchmarks.beside_a_job`.

Starts a server in a temporary folder and sends requests one after another: with no job, in every
stage of a running adaptation job, then again with no job. Each stage has its share of the requests.
After it, the job continues without requests, because at its low priority it hardly progresses
beside them. A request counts if the job ran before it and after it. Prints a table of latencies;
`--out` writes all figures as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import machine
from benchmarks.server import serving
from models.adaptation.plan import STAGES
from models.bundle import DEFAULT_TASK, read_bundle
from models.smoothing import best_device, named_runtime
from service.cli.bench.speed import (
    SELECTION_ROWS,
    SIGMA,
    WAIT_SECONDS,
    Ask,
    driven,
    percentiles,
    post,
)
from service.config import Settings
from service.jobs import Mode
from service.predictions.question import DEFAULT_ROWS

IMAGE = Path(__file__).parents[1] / "docs" / "ship.png"
NAME = "made beside a benchmark"
WARM = 5
"""Requests before each block that are not counted."""
LOOK_SECONDS = 0.1

Timings = list[tuple[str, float]]
"""The stage during each request, and the request's seconds."""


async def measured(
    url: str, question: Mapping[str, str], task: Mapping[str, Any], requests: int
) -> dict[str, Any]:
    """Figures of at least `requests` requests beside jobs, and of as many before and after."""
    image, rows = IMAGE.read_bytes(), int(question["n"]) + int(question.get("n0", 0))
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_SECONDS) as client:
        send = partial(post, client, question)
        before = await _alone(send, image, requests)
        beside = await _beside_jobs(client, send, image, task, requests)
        after = await _alone(send, image, requests)
    blocks = {"before": before, "after": after, "nothing beside it": before + after}
    blocks["beside a job"] = [seconds for _, seconds in beside]
    for stage in STAGES:
        if taken := [seconds for asked_in, seconds in beside if asked_in == stage]:
            blocks[stage] = taken
    figures: dict[str, Any] = {name: _figures(taken, rows) for name, taken in blocks.items()}
    alone, busy = figures["nothing beside it"], figures["beside a job"]
    figures["ratio"] = {
        name: round(busy[name] / alone[name], 2) for name in ("p50", "p99", "rows/s")
    }
    return figures


async def _alone(send: Ask, image: bytes, requests: int) -> list[float]:
    await driven(send, [image] * WARM, 1)
    return await driven(send, [image] * requests, 1)


async def _beside_jobs(
    client: httpx.AsyncClient, send: Ask, image: bytes, task: Mapping[str, Any], requests: int
) -> Timings:
    """Timings of `requests` requests, equally many in each stage, beside as many jobs as that
    needs.
    """
    left_out = {"personalizing": task.get("steps") == 0, "finetuning": task.get("epochs") == 0}
    stages = [stage for stage in STAGES if not left_out.get(stage)]
    timings: Timings = []
    seeds = count()
    while len(timings) < requests:
        seen, seeded = len(timings), {**task, "name": NAME, "seed": next(seeds)}
        made = (await client.post("/tasks", json=seeded)).raise_for_status()
        stage = await _stage(client, made.headers["Location"])
        while stage is not None:
            if sum(before == stage for before, _ in timings) * len(stages) >= requests:
                await asyncio.sleep(LOOK_SECONDS)
                stage = await _stage(client, made.headers["Location"])
                continue
            (seconds,) = await driven(send, [image], 1)
            now = await _stage(client, made.headers["Location"])
            if now is not None:
                timings.append((stage, seconds))
            stage = now
        if len(timings) == seen:
            raise RuntimeError("the job ended before one question was answered beside it")
    return timings


async def _stage(client: httpx.AsyncClient, location: str) -> str | None:
    """The stage of the job, once it has one, or None where it is ready.

    Raises RuntimeError where it has failed.
    """
    while True:
        task = (await client.get(location)).raise_for_status().json()
        if task["state"] not in ("queued", "running", "ready"):
            raise RuntimeError(f"the adaptation {task['state']}: {task['problem']}")
        if task["state"] == "ready" or task["stage"] is not None:
            return None if task["state"] == "ready" else str(task["stage"])
        await asyncio.sleep(LOOK_SECONDS)


def _figures(taken: Sequence[float], rows: int) -> dict[str, float]:
    speed = rows * len(taken) / sum(taken)
    return {"requests": len(taken), **percentiles(taken), "rows/s": round(speed, 1)}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| | requests | p50, s | p99, s | rows/s |", "|---|---|---|---|---|"]
    for name in ("nothing beside it", "beside a job", *STAGES, "ratio"):
        if name in figures:
            cells = (figures[name].get(part, "") for part in ("requests", "p50", "p99", "rows/s"))
            lines.append(f"| {' | '.join([name, *map(str, cells)])} |")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=[mode.value for mode in Mode], default="predict")
    parser.add_argument("--n", type=int, help="the mode's own unless given")
    parser.add_argument("--requests", type=int, default=120, help="of each block, at least")
    parser.add_argument("--labels", help="split by commas; the default task's unless given")
    for setting in ("shots", "steps", "epochs"):
        parser.add_argument(f"--{setting}", type=int, help="the set's own unless given")
    parser.add_argument("--out", type=Path, help="a JSON file of all figures")
    arguments = parser.parse_args(given)
    mode = Mode(arguments.mode)
    question = {
        "mode": mode.value,
        "sigma": str(SIGMA),
        "n": str(arguments.n or DEFAULT_ROWS[mode]),
    }
    if mode is Mode.CERTIFY:
        question["n0"] = str(SELECTION_ROWS)
    labels = arguments.labels.split(",") if arguments.labels else read_bundle(DEFAULT_TASK).labels
    settings = {name: getattr(arguments, name) for name in ("shots", "steps", "epochs")}
    task = {"labels": list(labels), **{k: v for k, v in settings.items() if v is not None}}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        try:
            with serving(Path(folder), log=log) as (url, _):
                figures = asyncio.run(measured(url, question, task, arguments.requests))
        except Exception:
            log.seek(0)
            print(log.read().decode(errors="replace"), file=sys.stderr)
            raise
    print(table(figures))
    if arguments.out:
        report = {
            "question": question,
            "task": task,
            "runtime": named_runtime(Settings().runtime).name,
            "machine": machine(best_device()),
            **figures,
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
