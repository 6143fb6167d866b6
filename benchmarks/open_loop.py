"""Requests at random times, independent of earlier ones, and their outcomes."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from service.jobs import Mode
from service.predictions.question import DEFAULT_ROWS, DEFAULT_SELECTION_ROWS

IMAGE = (Path(__file__).parents[1] / "docs" / "ship.png").read_bytes()
ROWS: dict[Mode, int] = {
    Mode.PREDICT: DEFAULT_ROWS[Mode.PREDICT],
    Mode.CERTIFY: DEFAULT_SELECTION_ROWS + DEFAULT_ROWS[Mode.CERTIFY],
}
"""Noise rows of a request with default settings, by mode."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one request after `seconds`; status 0 where there was no response."""

    mode: Mode
    status: int
    seconds: float
    retry_after: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """The offered load: rows per second, duration, and the share of PREDICT requests."""

    rows_per_second: float
    seconds: float
    predict_share: float
    wait_seconds: int
    keys: Sequence[str]
    seed: int = 0

    @property
    def questions_per_second(self) -> float:
        """The rate of arrivals."""
        shares = {Mode.PREDICT: self.predict_share, Mode.CERTIFY: 1 - self.predict_share}
        rows_a_question = sum(ROWS[mode] * share for mode, share in shares.items())
        return self.rows_per_second / rows_a_question


async def ask(client: httpx.AsyncClient, mode: Mode, wait_seconds: int, key: str) -> Outcome:
    """The outcome of one request; a broken connection is one too."""
    fields = {"mode": mode.value}
    headers = {"Prefer": f"wait={wait_seconds}", "Authorization": f"Bearer {key}"}
    began, status, retry_after = time.perf_counter(), 0, None
    try:
        answer = await client.post("/predict", files={"image": IMAGE}, data=fields, headers=headers)
    except httpx.TransportError:
        pass
    else:
        status, header = answer.status_code, answer.headers.get("Retry-After", "")
        retry_after = int(header) if header.isdecimal() else None
    return Outcome(mode, status, time.perf_counter() - began, retry_after)


async def offered(client: httpx.AsyncClient, load: Load) -> list[Outcome]:
    """Outcomes of requests at random times (a Poisson process), independent of earlier ones."""
    chance, asking = random.Random(load.seed), []
    now = time.perf_counter()
    end = now + load.seconds
    arrival = now + chance.expovariate(load.questions_per_second)
    while arrival < end:
        await asyncio.sleep(arrival - time.perf_counter())
        mode = Mode.PREDICT if chance.random() < load.predict_share else Mode.CERTIFY
        question = ask(client, mode, load.wait_seconds, chance.choice(load.keys))
        asking.append(asyncio.create_task(question))
        arrival += chance.expovariate(load.questions_per_second)
    return list(await asyncio.gather(*asking))


def summary(outcomes: Sequence[Outcome], wait_seconds: int) -> dict[str, Any]:
    """Figures of admitted and rejected requests, with latencies."""
    refused = [each for each in outcomes if each.status in (429, 503)]
    admitted = [each for each in outcomes if each.status in (200, 504)]
    modes = {mode: [each for each in admitted if each.mode is mode] for mode in Mode}
    figures: dict[str, Any] = {
        "asked": len(outcomes),
        "admitted": len(admitted),
        "by status": dict(sorted(Counter(each.status for each in outcomes).items())),
        "refused by mode": dict(Counter(each.mode.value for each in refused)),
        "refusals without Retry-After": sum(not each.retry_after for each in refused),
        "deadline, s": wait_seconds,
        "past the deadline": sum(each.status == 504 for each in admitted),
        "rows answered": sum(ROWS[each.mode] for each in admitted if each.status == 200),
    }
    for mode, those in modes.items():
        if those:
            taken = _percentiles([each.seconds for each in those])
            figures[f"{mode.value}, admitted, s"] = {"answers": len(those), **taken}
    if refused:
        figures["a refusal takes, s"] = _percentiles([each.seconds for each in refused])
        figures["Retry-After, s"] = _percentiles([each.retry_after or 0 for each in refused])
    return figures


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(seconds, q)), 3) for q in (50, 99)}
