from __future__ import annotations

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from service import traces
from service.telemetry import VERSION
from tests.serving import Service, serving, split
from tests.test_traces import TRACE, VALID


def counted(name: str, **labels: str) -> float:
    """A sample of this process's metrics; the tests share them, so only differences mean much."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_metrics_count_what_happened(service: Service) -> None:
    """/metrics is valid Prometheus text that counts requests, problems, radii and abstentions."""
    requests = {"method": "POST", "route": "/predict", "status": "200"}
    before = counted("vouchsafe_requests_total", **requests)
    radii = counted("vouchsafe_certified_radius_count")
    rejected = counted("vouchsafe_rejections_total", reason="invalid-field")
    location = f"/jobs/{(await service.ask()).json()['id']}"
    await service.ask(n="0")
    for _ in range(3):
        await service.client.get(location)
    await service.client.get("/nowhere/at/all")
    response = await service.client.get("/metrics")
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["vouchsafe_requests_total", tuple(sorted(requests.items()))] == before + 1
    assert samples["vouchsafe_certified_radius_count", ()] == radii + 1
    assert samples["vouchsafe_rejections_total", (("reason", "invalid-field"),)] == rejected + 1
    assert samples["vouchsafe_queue_rows", ()] == 0
    routes = {dict(labels).get("route") for name, labels in samples if "requests" in name}
    assert {"/jobs/{id}", "unmatched"} <= routes
    assert not any(route and location in route for route in routes)
    assert samples["vouchsafe_build_info", (("version", VERSION),)] == 1


async def test_abstentions_are_counted_once() -> None:
    """An abstention is counted once, whoever reads it."""
    labels = {"task": "default", "mode": "certify"}
    before = counted("vouchsafe_abstentions_total", **labels)
    async with serving(votes=split) as service:
        answered = (await service.ask()).json()
        await service.client.get(f"/jobs/{answered['id']}")
    assert counted("vouchsafe_abstentions_total", **labels) == before + 1


async def test_requests_are_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Each request leaves one record with its id, which the answer carries, and its job's."""
    with caplog.at_level("INFO", "vouchsafe.access"):
        headers = {"X-Request-Id": "mine-1", "traceparent": VALID}
        response = await service.ask(headers=headers)
        other = await service.client.get("/livez", headers={"X-Request-Id": "bad id\n"[:6]})
    first, second = (vars(record) for record in caplog.records)
    assert response.headers["x-request-id"] == first["request_id"] == "mine-1"
    told = [first[name] for name in ("job_id", "task_id", "trace_id", "method", "route", "status")]
    assert told == [response.json()["id"], "default", TRACE, "POST", "/predict", 200]
    assert first["message"] == f"POST /predict 200 in {first['seconds']:.4f} s"
    assert other.headers["x-request-id"] == second["request_id"] != "bad id"
    assert len(second["trace_id"]) == 32
    assert "job_id" not in second


@pytest.mark.parametrize("headers", [{}, {"traceparent": VALID.upper()}])
async def test_jobs_without_a_trace_begin_one(service: Service, headers: dict[str, str]) -> None:
    """A job whose request had no valid traceparent gets one of a new trace."""
    for _ in range(2):
        assert (await service.ask(headers=headers)).status_code == 200
    contexts = {lease.job.id: lease.job.traceparent for lease in service.voter.leases}
    assert len({traces.trace_id(context) for context in contexts.values()} - {TRACE}) == 2
    assert all(traces.received([context or ""]) == context for context in contexts.values())


async def test_jobs_keep_their_trace_and_are_the_same_in_any(service: Service) -> None:
    """The worker sees the caller's trace; an Idempotency-Key finds its job from another one."""
    other = VALID.replace(TRACE, "1" * 32)
    first = await service.ask(headers={"traceparent": VALID, "Idempotency-Key": "once"})
    again = await service.ask(headers={"traceparent": other, "Idempotency-Key": "once"})
    assert first.json() == again.json()
    assert {lease.job.traceparent for lease in service.voter.leases} == {VALID}
    assert (await service.ask(headers={"traceparent": other})).json()["id"] != first.json()["id"]
    assert len({lease.job.key for lease in service.voter.leases}) == 1
