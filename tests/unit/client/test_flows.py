"""Retries of the clients, by a clock that only pauses move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import pytest

from service.client import Busy, DeadlinePassed, Unreachable, VouchsafeError, flows
from service.client.flows import Call, Document, Flow, Patience
from tests.support.fakes import FakeClock

Outcome = tuple[float, Document | VouchsafeError]
"""The seconds that a call takes, and its document or its error."""
QUESTION = {"n": 200, "sigma": None}


def busy(seconds: float | None) -> Busy:
    return Busy(503, {"detail": "later"}, seconds)


LOST, LATE = Unreachable("the connection ended"), DeadlinePassed(504, {})


class Run:
    """A flow that was driven to its end: its `calls`, its `pauses`, its `result` or `error`."""

    def __init__(self, flow: Flow[Any], clock: FakeClock, outcomes: Iterable[Outcome]) -> None:
        self.calls: list[Call] = []
        self.pauses: list[float] = []
        self.error: VouchsafeError | None = None
        script = iter(outcomes)
        try:
            step = flow.send(None)
            while True:
                if isinstance(step, Call):
                    self.calls.append(step)
                    seconds, outcome = next(script)
                    clock.advance(seconds)
                    if isinstance(outcome, VouchsafeError):
                        step = flow.throw(outcome)
                    else:
                        step = flow.send(httpx.Response(200, json=outcome))
                else:
                    self.pauses.append(step.seconds)
                    clock.advance(step.seconds)
                    step = flow.send(None)
        except StopIteration as end:
            self.result = end.value
        except VouchsafeError as raised:
            self.error = raised

    def keys(self) -> list[str]:
        return [call.request["headers"]["Idempotency-Key"] for call in self.calls]


def flow(name: str, clock: FakeClock, seconds: float = 100.0) -> Flow[Any]:
    """One of the clients' flows, with this patience."""
    patience = Patience(seconds, clock)
    if name == "batch":
        return flows.batch([("images", ("a.png", b"a"))], patience, QUESTION)
    if name in ("predict", "demonstrate"):
        return {"predict": flows.predict, "demonstrate": flows.demonstrate}[name](
            b"a", patience, None, QUESTION
        )
    if name == "make_task":
        return flows.make_task(["cat"], patience, {})
    return flows.get("/jobs/1", patience)


FORMS = ("predict", "demonstrate", "batch")
DONE = {"status": "done"}


@pytest.mark.parametrize("name", [*FORMS, "make_task", "get"])
def test_busy_and_lost_calls_are_sent_again(name: str) -> None:
    """After Retry-After, and after growing pauses; a form keeps its Idempotency-Key."""
    clock = FakeClock()
    script = [(0.0, busy(7.0)), (0.0, LOST), (0.0, busy(3.0)), (0.0, LOST), (0.0, DONE)]
    run = Run(flow(name, clock), clock, script)
    assert (run.result, run.pauses) == (DONE, [7.0, 0.5, 3.0, 1.0])
    assert len({(call.method, call.path) for call in run.calls}) == 1
    if name in FORMS:
        assert len(run.keys()) == 5
        assert len(set(run.keys())) == 1


@pytest.mark.parametrize("name", [*FORMS, "make_task", "get"])
def test_retries_end(name: str) -> None:
    """Without Retry-After, with one beyond the patience, and at the fifth lost connection."""
    for script, pauses in (
        ([(0.0, busy(None))], []),
        ([(0.0, busy(100.0))], []),
        ([(60.0, busy(30.0)), (0.0, busy(10.0))], [30.0]),
        ([(0.0, LOST)] * 5, [0.5, 1.0, 2.0, 4.0]),
        ([(99.0, LOST), (0.5, LOST)], [0.5]),
    ):
        clock = FakeClock()
        run = Run(flow(name, clock), clock, script)
        assert (run.error, run.pauses) == (script[-1][1], pauses)
        assert len(run.calls) == len(script)


@pytest.mark.parametrize("name", ["predict", "demonstrate"])
def test_a_late_answer_is_waited_for_again(name: str) -> None:
    """At once, under the same key, for the seconds that are left; then it is the error."""
    clock = FakeClock()
    run = Run(flow(name, clock), clock, [(40.0, LATE), (30.0, DONE)])
    assert run.result == DONE
    assert [call.wait for call in run.calls] == [100, 60]
    assert run.calls[1].request["headers"]["Prefer"] == "wait=60"
    assert len(set(run.keys())) == 1
    clock = FakeClock()
    assert Run(flow(name, clock), clock, [(100.0, LATE)]).error is LATE


def test_a_gateway_s_timeout_of_a_read_is_raised() -> None:
    """A call that does not wait would be repeated without a pause."""
    clock = FakeClock()
    assert Run(flow("get", clock), clock, [(0.0, LATE)]).error is LATE


def test_an_unfinished_demonstration_is_requested_again() -> None:
    """Under one key until it ends; DeadlinePassed names it once the patience has ended."""
    clock, open_ = FakeClock(), {"status": "running", "id": "d"}
    run = Run(flow("demonstrate", clock), clock, [(40.0, open_), (30.0, DONE)])
    assert run.result == DONE
    assert [call.wait for call in run.calls] == [100, 60]
    assert len(set(run.keys())) == 1
    clock = FakeClock()
    run = Run(flow("demonstrate", clock), clock, [(100.0, open_)])
    assert isinstance(run.error, DeadlinePassed)
    assert run.error.document["job"] == "d"


def test_fields_without_a_value_are_left_out() -> None:
    """A caller's own key is sent as it is."""
    clock = FakeClock()
    asked = flows.predict(b"a", Patience(1.0, clock), "mine", QUESTION)
    run = Run(asked, clock, [(0.0, DONE)])
    assert run.keys() == ["mine"]
    assert run.calls[0].request["data"] == {"n": "200"}
