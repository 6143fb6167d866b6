from __future__ import annotations

import json

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from service.telemetry import VERSION
from tests.serving import Service, serving, split


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
    """Each request leaves one JSON line with its id, which the answer carries, and its job's."""
    with caplog.at_level("INFO", "vouchsafe.access"):
        response = await service.ask(headers={"X-Request-Id": "mine-1"})
        other = await service.client.get("/livez", headers={"X-Request-Id": "bad id\n"[:6]})
    first, second = (json.loads(record.message) for record in caplog.records)
    assert response.headers["x-request-id"] == first["request"] == "mine-1"
    assert (first["job"], first["route"], first["status"]) == (
        response.json()["id"],
        "/predict",
        200,
    )
    assert other.headers["x-request-id"] == second["request"] != "bad id"
