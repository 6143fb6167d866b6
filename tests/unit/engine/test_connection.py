"""service/engine/connection.py: an engine that does not answer, and what the log says."""

from __future__ import annotations

import asyncio
import time

import pytest
from redis.exceptions import RedisError

from service.engine import connection as reaches
from service.engine.connection import ConnectionState, EngineConnection, EngineUnreachable
from service.worker.compute import ComputeThread
from service.worker.loop import work
from tests.support.fakes import FakeModel


async def fails(error: Exception) -> None:
    raise error


def test_an_outage_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """However often the engine does not answer: a line at the beginning, and one at the end."""
    connection_state = ConnectionState()
    with caplog.at_level("INFO"):
        for _ in range(3):
            connection_state.mark_down(ConnectionError("no route"), time.monotonic())
        assert connection_state.is_down
        connection_state.mark_up()
        connection_state.mark_up()
    first, second = caplog.messages
    assert "out of reach (ConnectionError: no route)" in first
    assert "answers again" in second
    assert not connection_state.is_down


def test_a_late_failure_is_no_outage() -> None:
    """What was asked before the engine answered something else says nothing of it now."""
    connection_state, asked = ConnectionState(), time.monotonic()
    connection_state.mark_up()
    connection_state.mark_down(TimeoutError(), asked - 1)
    assert not connection_state.is_down


@pytest.mark.parametrize("error", [ConnectionError("gone"), RedisError("OOM"), TimeoutError()])
async def test_what_the_engine_cannot_do_is_an_outage(error: Exception) -> None:
    """Errors of the connection and of Redis are outages; others are the caller's to see."""
    connection = EngineConnection()
    with pytest.raises(EngineUnreachable):
        await connection.ask(fails(error))
    assert connection.state.is_down
    with pytest.raises(ValueError, match="counts"):
        await connection.insist(lambda: fails(ValueError("counts")), 60)


async def test_a_silent_engine_does_not_hold_up_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to stop while a call hangs for ever, the worker returns soon after."""
    monkeypatch.setattr(reaches, "LEAVING_SECONDS", 0.05)

    class Silent:
        def __getattr__(self, name: str) -> object:
            async def call(*_: object) -> None:
                asked.set()
                await asyncio.Event().wait()

            return call

    asked, stop, thread = asyncio.Event(), asyncio.Event(), ComputeThread()
    models = {"default": FakeModel()}
    working = work(Silent(), models, worker_id="w", stop=stop, thread=thread)  # type: ignore[arg-type]
    running = asyncio.create_task(working)
    await asked.wait()
    stop.set()
    async with asyncio.timeout(20):
        await running
    thread.close()
