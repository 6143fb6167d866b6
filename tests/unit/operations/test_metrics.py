from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from service.config import Settings
from service.engine.protocol import EngineStats, PriorityState
from service.operations import metrics, tracing
from service.operations.logs import IDS
from service.operations.metrics import VERSION
from tests.support.http import TRACE, VALID
from tests.support.metrics import counted
from tests.support.paths import ROOT
from tests.support.serving import Service, nine_of_ten, serving, split

PAGE = ROOT / "docs" / "metrics.md"


def scraped(response: httpx.Response) -> dict[str, float]:
    """Every sample of /metrics, by its name with its labels."""
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def labels_of(family: Metric) -> tuple[str, ...]:
    """The labels of a family that has samples; `le` is the histogram's own."""
    return tuple(name for sample in family.samples[:1] for name in sample.labels if name != "le")


async def test_metrics_count_what_happened(service: Service) -> None:
    """/metrics is valid Prometheus text that counts requests, problems, radii and abstentions."""
    requests = {"method": "POST", "route": "/predict", "status": "200"}
    before = counted("vouchsafe_http_requests_total", **requests)
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
    assert samples["vouchsafe_http_requests_total", tuple(sorted(requests.items()))] == before + 1
    assert samples["vouchsafe_certified_radius_count", ()] == radii + 1
    assert samples["vouchsafe_rejections_total", (("reason", "invalid-field"),)] == rejected + 1
    routes = {dict(labels).get("route") for name, labels in samples if "requests" in name}
    assert {"/jobs/{id}", "unmatched"} <= routes
    assert not any(route and location in route for route in routes)
    assert samples["vouchsafe_build_info", (("version", VERSION),)] == 1


async def test_abstentions_are_counted_once() -> None:
    """An abstention is counted once, whoever reads it."""
    labels = {"task": "default", "mode": "certify", "outcome": "abstained"}
    before = counted("vouchsafe_predictions_total", **labels)
    async with serving(votes=split) as service:
        answered = (await service.ask()).json()
        await service.client.get(f"/jobs/{answered['id']}")
    assert counted("vouchsafe_predictions_total", **labels) == before + 1


def test_the_page_names_every_metric() -> None:
    """docs/metrics.md has each metric with its type and labels, and no other."""
    queue = EngineStats({lane: PriorityState(1, 1.0) for lane in ("hi", "lo")}, 1.0, 1, 1, True)
    families = text_string_to_metric_families(metrics.exposition(queue, 1).decode())
    declared = [one for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)]
    labels = {one.describe()[0].name: one._labelnames for one in declared}
    coded = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            labels.get(family.name) or labels_of(family),
        )
        for family in families
        if family.name.startswith("vouchsafe_")
    }
    written = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `(vouchsafe_\w+)` \| (\w+) \|([^|]*)\|", PAGE.read_text(), re.MULTILINE
        )
    }
    assert written == coded


def test_the_page_says_what_is_meant() -> None:
    """Every setting and field that the page names is there."""
    page = PAGE.read_text()
    settings = {
        name.removeprefix("VOUCHSAFE_").lower() for name in re.findall("VOUCHSAFE_[A-Z_]+", page)
    }
    assert settings <= Settings.model_fields.keys()
    assert settings >= {"log_format", "log_level"}
    assert all(f"`{name}`" in page for name in IDS)


async def test_queue_figures_are_those_of_the_scrape() -> None:
    """/metrics tells how the queue and the adaptation jobs stand as it is asked."""
    async with serving() as service:
        service.voter.open.clear()
        for mode in ("certify", "predict"):
            told = await service.ask(mode=mode, n="120", headers={"Prefer": "respond-async"})
            assert told.status_code == 202
        await service.voter.busy.wait()
        service.engine._clock.advance(7)
        asked = {"labels": ["cat", "dog"]}
        assert (await service.client.post("/tasks", json=asked)).status_code == 202
        samples = scraped(await service.client.get("/metrics"))
        assert samples['vouchsafe_queue_rows{priority="hi"}'] == 120
        assert samples['vouchsafe_queue_rows{priority="lo"}'] == 220
        assert samples['vouchsafe_queue_oldest_seconds{priority="lo"}'] == 7
        assert samples["vouchsafe_workers"] == samples["vouchsafe_engine_up"] == 1
        assert samples["vouchsafe_adaptations_open"] == 1
        assert samples["vouchsafe_dead_letters_total"] == 0
        assert "vouchsafe_redis_persistence_up" not in samples


async def test_predictions_are_counted_by_outcome() -> None:
    """A label and an abstention are two outcomes of the same task and mode."""
    labels = {"task": "default", "mode": "predict"}
    outcomes = ("answered", "abstained")

    def counts() -> list[float]:
        name = "vouchsafe_predictions_total"
        return [counted(name, **labels, outcome=outcome) for outcome in outcomes]

    before = counts()
    async with serving(votes=split) as service:
        await service.ask(mode="predict")
        service.voter.votes = nine_of_ten
        await service.ask(mode="predict")
    assert counts() == [before[0] + 1, before[1] + 1]


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
    assert len({tracing.trace_id(context) for context in contexts.values()} - {TRACE}) == 2
    assert all(tracing.received([context or ""]) == context for context in contexts.values())


async def test_jobs_keep_their_trace_and_are_the_same_in_any(service: Service) -> None:
    """The worker sees the caller's trace; an Idempotency-Key finds its job from another one."""
    other = VALID.replace(TRACE, "1" * 32)
    first = await service.ask(headers={"traceparent": VALID, "Idempotency-Key": "once"})
    again = await service.ask(headers={"traceparent": other, "Idempotency-Key": "once"})
    assert first.json() == again.json()
    assert {lease.job.traceparent for lease in service.voter.leases} == {VALID}
    assert (await service.ask(headers={"traceparent": other})).json()["id"] != first.json()["id"]
    assert len({lease.job.key for lease in service.voter.leases}) == 1
