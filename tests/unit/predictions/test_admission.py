"""service/predictions/admission.py: how long a question waits for a worker that serves its task."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from models import noise
from service.config import Settings
from service.engine.memory import MemoryEngine
from service.engine.options import EngineOptions
from service.engine.protocol import Capacity, Worker
from service.errors import Backlog
from service.predictions import admission as doors
from service.predictions.admission import MOST_SIGMAS, AdmissionControl, sigma_seconds
from service.predictions.question import PredictRequest
from service.predictions.service import Predictions
from tests.support.serving import KEYS, NUMERICS, SECRET, TASKS, png

BIRDS = TASKS["default"].served_digest(NUMERICS)
ASKED = PredictRequest.model_validate({"image": png(), "task": "birds", "n": 30, "n0": 10})


@pytest.fixture
async def engine() -> MemoryEngine:
    """An engine of one worker, which serves another task."""
    built = MemoryEngine(EngineOptions(shard_rows=10), poll_seconds=0.01)
    await built.pull(Worker("w", {"default": "bundle-a"}), 1)
    return built


@pytest.fixture
def door(engine: MemoryEngine, tmp_path: Path) -> AdmissionControl:
    return AdmissionControl(Settings(data_dir=tmp_path), engine)


async def admitted(door: AdmissionControl) -> str:
    return (await door.admit(ASKED, TASKS["default"], None, may_be_known=False)).digest


async def test_a_new_task_is_waited_for(engine: MemoryEngine, door: AdmissionControl) -> None:
    """A worker has some seconds to find a task that was published a moment ago."""
    waiting = asyncio.create_task(admitted(door))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await engine.pull(Worker("w", {"default": "bundle-a", "birds": BIRDS}, [NUMERICS]), 1)
    assert await waiting == BIRDS


async def test_a_task_that_no_worker_serves_is_refused_at_once(
    engine: MemoryEngine, door: AdmissionControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not new any more once it has been waited for; one of its name that was forgotten is."""
    monkeypatch.setattr(doors, "ANNOUNCING_SECONDS", 0.3)
    looks: list[str | None] = []
    capacity = engine.capacity

    async def counted(owner: str | None) -> Capacity:
        looks.append(owner)
        return await capacity(owner)

    monkeypatch.setattr(engine, "capacity", counted)
    for waits, is_forgotten in ((True, False), (False, False), (False, False), (True, True)):
        looks.clear()
        if is_forgotten:
            door.delete("birds")
        with pytest.raises(Backlog, match='No live worker serves task "birds"'):
            await admitted(door)
        assert (len(looks) > 1) == waits


async def test_a_task_that_is_made_anew_is_new(engine: MemoryEngine, tmp_path: Path) -> None:
    """Workers are given the time to find it once more."""
    tasks = TASKS | {"birds": replace(TASKS["default"], id="birds")}
    desk = Predictions(Settings(data_dir=tmp_path), engine, tasks, SECRET, KEYS)
    desk._admission._first_requests["birds"] = time.monotonic() - 60
    with pytest.raises(Backlog):
        await desk.submit(ASKED, None, None)
    await desk.cancel_stale("birds")
    asking = asyncio.create_task(desk.submit(ASKED, None, None))
    await asyncio.sleep(0.1)
    assert not asking.done()
    digest = tasks["birds"].served_digest(NUMERICS)
    await engine.pull(Worker("w", {"birds": digest}, [NUMERICS]), 1)
    assert await asking
    await desk.close()


async def test_a_new_sigma_is_charged_once(engine: MemoryEngine, door: AdmissionControl) -> None:
    """Preparing it costs a worker time, which is charged in rows at the measured speed; a sigma
    among those asked for lately costs nothing."""
    await engine.pull(Worker("w", {"birds": BIRDS}, [NUMERICS]), 1)
    engine._rate.count(1000, engine._clock())
    speed = (await engine.capacity()).rows_per_second
    assert speed > 0

    async def charged(sigma: float) -> int:
        asked = ASKED.model_copy(update={"sigma": sigma})
        rows = (await door.admit(asked, TASKS["default"], None, may_be_known=False)).setup_rows
        again = await door.admit(asked, TASKS["default"], None, may_be_known=False)
        assert again.setup_rows == rows  # It is charged until a question of it is queued.
        door.prepared([sigma])
        return rows

    most = door._settings.max_queue_rows - ASKED.rows
    assert await charged(0.5) == min(most, math.ceil(sigma_seconds(0.5) * speed)) > 0
    assert await charged(0.5) == 0
    for number in range(MOST_SIGMAS - 1):
        assert await charged(0.6 + number / 1000) > 0
    assert await charged(0.5) == 0
    assert await charged(0.4) > 0
    assert await charged(0.6) > 0


async def test_a_new_sigma_never_makes_a_question_too_large(
    engine: MemoryEngine, tmp_path: Path
) -> None:
    """A question of as many rows as may wait is let in, whatever its sigma."""
    await engine.pull(Worker("w", {"birds": BIRDS}, [NUMERICS]), 1)
    engine._rate.count(1000, engine._clock())
    tight = AdmissionControl(Settings(data_dir=tmp_path, max_queue_rows=ASKED.rows), engine)
    admission = await tight.admit(ASKED, TASKS["default"], None, may_be_known=False)
    assert (admission.digest, admission.setup_rows) == (BIRDS, 0)


def test_the_door_knows_how_many_sigmas_a_worker_keeps() -> None:
    """The door remembers as many sigmas as a worker keeps."""
    assert noise._computed_table.cache_parameters()["maxsize"] == MOST_SIGMAS
