"""The synchronous client: answers, typed exceptions, retries."""

from __future__ import annotations

from pathlib import Path

import pytest

from service import client
from service.client import Client
from tests.support.listening import listening
from tests.support.scripted import Response, scripted
from tests.support.serving import DIGEST, LABELS, PNG, Service

BUSY = {"type": "urn:vouchsafe:problem:backlog", "title": "Full", "status": 503, "detail": "later"}
ANSWER = {"label": "cat", "radius": 0.3}


def test_an_answer_is_that_of_the_service(tmp_path: Path) -> None:
    """Bytes and a path are classified alike; the models are those of GET /models."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(PNG)
    service = Service(data_dir=tmp_path / "data")
    with listening(service) as running, Client(running.url) as asking:
        answers = [asking.predict(image, sigma=0.5, n=200) for image in (PNG, picture)]
        cascade = asking.predict(PNG, sigma=[0.5, 0.25], n=200)
        (model,) = asking.models()
    assert (cascade["method"], cascade["sigma"]) == ("cascade", [0.5, 0.25])
    for answer in answers:
        assert (answer["label"], answer["certified"], answer["sigma"]) == ("cat", True, 0.5)
        assert answer["bundle"] == DIGEST
    assert model["labels"] == list(LABELS)


def test_a_refusal_is_an_exception_with_the_document(tmp_path: Path) -> None:
    """A field outside its limits, an unknown task and a missing key are types of their own."""
    service = Service(data_dir=tmp_path / "data", api_keys=("k" * 32,))
    with listening(service) as running:
        with Client(running.url, key="k" * 32) as asking:
            with pytest.raises(client.InvalidRequest, match="alpha") as refused:
                asking.predict(PNG, alpha=2.0)
            assert (refused.value.status, refused.value.slug) == (422, "invalid-field")
            assert refused.value.document["errors"][0]["field"] == "alpha"
            with pytest.raises(client.InvalidRequest, match="sigma"):
                asking.predict(PNG, sigma=[])
            with pytest.raises(client.NotFound):
                asking.predict(PNG, task="no-such-task")
        with Client(running.url) as stranger, pytest.raises(client.Unauthorized):
            stranger.predict(PNG)


def test_busy_and_late_answers_are_tried_again_as_one_job() -> None:
    """429, 503 and 504 are retried with one Idempotency-Key until the answer is there."""
    now = {"Retry-After": "0"}
    responses = [(429, now, {}), (503, now, BUSY), (504, {}, {"job": "j"}), (200, {}, ANSWER)]
    with scripted(*responses) as server, Client(server.url) as asking:
        assert asking.predict(PNG, task="t", method=None) == ANSWER
    keys = {request["Idempotency-Key"] for request in server.requests}
    assert len(server.requests) == 4
    assert len(keys) == 1
    assert b'name="task"' in server.requests[0]["body"]
    assert b'name="method"' not in server.requests[0]["body"]


def test_patience_ends() -> None:
    """A Retry-After beyond the patience, or none at all, is Busy at once."""
    refusals = [(503, {"Retry-After": "60"}, BUSY), (503, {}, BUSY)]
    with scripted(*refusals) as server, Client(server.url, timeout=30) as asking:
        for seconds in (60.0, None):
            with pytest.raises(client.Busy, match="503: later") as refused:
                asking.predict(PNG)
            assert refused.value.retry_after == seconds
            assert refused.value.document == BUSY


def test_other_failures_have_types_too() -> None:
    """A failed job, a body that is no document, and a connection that ends early."""
    failed = {"type": "urn:vouchsafe:problem:shard-dead", "detail": "the job failed"}
    responses: list[Response] = [(500, {}, failed), (502, {}, "<html>"), (0, {}, "")]
    with scripted(*responses) as server, Client(server.url, timeout=0.4) as asking:
        with pytest.raises(client.ServiceFailed) as refused:
            asking.predict(PNG)
        assert refused.value.slug == "shard-dead"
        with pytest.raises(client.ServiceFailed, match="no problem document"):
            asking.predict(PNG)
        with pytest.raises(client.Unreachable, match=server.url):
            asking.predict(PNG)


@pytest.mark.parametrize(
    ("url", "timeout", "reason"),
    [
        ("127.0.0.1:8000", 1.0, "must begin with http"),
        ("http://host:port", 1.0, "url = 'http://host:port'"),
        ("http://127.0.0.1", 0.0, "timeout = 0.0"),
    ],
)
def test_a_malformed_address_or_timeout_is_refused(url: str, timeout: float, reason: str) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match=reason):
        Client(url, timeout=timeout)
