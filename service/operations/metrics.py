"""Prometheus metrics of the service (docs/metrics.md), and the middleware of requests."""

from __future__ import annotations

import logging
import re
import secrets
from functools import partial
from importlib import metadata
from time import perf_counter

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.engine.protocol import EngineStats
from service.jobs import Mode
from service.operations import tracing
from service.operations.logs import naming

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_UNKNOWN = float("nan")
_log = logging.getLogger("vouchsafe.access")
disable_created_metrics()  # type: ignore[no-untyped-call]  # Their gauges are not used.


def _version() -> str:
    try:
        return metadata.version("vouchsafe-predictions")
    except metadata.PackageNotFoundError:
        return "unknown"


VERSION = _version()
"""The installed release, or `unknown` in a source tree that is not installed."""

REQUESTS = Counter(
    "vouchsafe_http_requests", "HTTP requests answered.", ["method", "route", "status"]
)
REQUEST_SECONDS = Histogram(
    "vouchsafe_http_request_duration_seconds",
    "Time to answer a request.",
    ["route"],
    buckets=_SECONDS,
)
REJECTIONS = Counter("vouchsafe_rejections", "Problems answered, by type.", ["reason"])
ROWS = Counter("vouchsafe_rows", "Noise rows computed.", ["task"])
BATCHES = Counter("vouchsafe_batches", "Device batches computed.", ["task"])
BATCH_ROWS = Histogram(
    "vouchsafe_batch_rows",
    "Rows in a device batch, without padding.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
)
BATCH_JOBS = Histogram(
    "vouchsafe_batch_jobs",
    "Jobs that share a device batch.",
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128),
)
PADDING_ROWS = Counter("vouchsafe_padding_rows", "Rows computed only to fill a network's batch.")
BATCH_SECONDS = Histogram(
    "vouchsafe_batch_duration_seconds",
    "Time to compute a device batch, and to load its networks if needed.",
    buckets=_SECONDS,
)
SHARDS = Counter(
    "vouchsafe_shards",
    "Shards that left a worker: committed, refused, failed, released, or lost in an outage.",
    ["outcome"],
)
SHAPES_LOWERED = Counter(
    "vouchsafe_shapes_lowered",
    "Times that a task was loaded for smaller batches, for lack of memory.",
)
QUEUE_SECONDS = Histogram(
    "vouchsafe_job_queue_duration_seconds",
    "Time from a job's acceptance to its first row's start.",
    buckets=_SECONDS,
)
CERTIFIED_RADIUS = Histogram(
    "vouchsafe_certified_radius",
    "Certified l2 radii, for pixels in [0, 1].",
    buckets=(0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0),
)
OUTCOMES = ("answered", "abstained")
PREDICTIONS = Counter(
    "vouchsafe_predictions",
    "Predictions answered, by outcome: a label (answered) or an abstention (abstained).",
    ["task", "mode", "outcome"],
)
DEMONSTRATIONS = Counter(
    "vouchsafe_demonstrations",
    "Demonstrations that ended: succeeded, failed or cancelled.",
    ["kind", "outcome"],
)
ADAPTATIONS = Counter(
    "vouchsafe_adaptations", "Adaptation jobs that ended: ready, failed or cancelled.", ["outcome"]
)
ADAPTATION_PROGRESS = Gauge(
    "vouchsafe_adaptation_progress", "Progress of the running adaptation, 0 to 1; NaN without one."
)
ADAPTATION_PROGRESS.set(float("nan"))
ADAPTATION_SECONDS = Histogram(
    "vouchsafe_adaptation_seconds",
    "Time from a job's first start to its end.",
    buckets=(1.0, 10.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0, 14_400.0, 86_400.0),
)
BUILD_INFO = Info("vouchsafe_build", "The running release.")
BUILD_INFO.info({"version": VERSION})


def delete(task: str) -> None:
    """Drop the series of a removed task, since the number of ids is unbounded."""
    for metric in (ROWS, BATCHES):
        metric.remove(task)
    for mode in Mode:
        for outcome in OUTCOMES:
            PREDICTIONS.remove(task, mode.value, outcome)


def exposition(queue: EngineStats | None, open_jobs: float | None) -> bytes:
    """Every metric in Prometheus' text format.

    `queue` is None if the engine does not answer: gauges are NaN then, and counters are left out.
    `open_jobs`, the number of adaptation jobs that have not ended, is left out if None.
    """
    now = CollectorRegistry()
    gauge = partial(Gauge, registry=now)
    gauge("vouchsafe_engine_up", "1 if the engine answers, else 0.").set(queue is not None)
    rows = gauge("vouchsafe_queue_rows", "Rows waiting or leased.", ["priority"])
    oldest = gauge(
        "vouchsafe_queue_oldest_seconds",
        "Age, since its job was accepted, of the oldest shard that no worker holds.",
        ["priority"],
    )
    for priority in (mode.priority for mode in Mode):
        rows.labels(priority).set(queue.priorities[priority].rows if queue else _UNKNOWN)
        oldest.labels(priority).set(
            queue.priorities[priority].oldest_seconds if queue else _UNKNOWN
        )
    speed = gauge("vouchsafe_queue_rows_per_second", "Speed, over the last minute of work.")
    speed.set(queue.rows_per_second if queue else _UNKNOWN)
    workers = gauge("vouchsafe_workers", "Live workers, as the engine counts them.")
    workers.set(queue.workers if queue else _UNKNOWN)
    if queue is not None:
        dead = "Shards that ended their jobs, by failures or worker crashes."
        Counter("vouchsafe_dead_letters", dead, registry=now).inc(queue.dead_letters)
    if queue is not None and queue.persists is not None:
        written = "1 if the last write of Redis to its disk succeeded, else 0."
        gauge("vouchsafe_redis_persistence_up", written).set(queue.persists)
    if open_jobs is not None:
        gauge("vouchsafe_adaptations_open", "Adaptation jobs queued or running.").set(open_jobs)
    return generate_latest(REGISTRY) + generate_latest(now)


class RequestTelemetry:
    """ASGI middleware: counts and times requests by route template and logs one record for each.

    - `X-Request-Id`: the caller's (at most 64 letters, digits, dots, dashes or underscores) or a
      new one, in the response and in the record.
    - Trace: of the caller's valid W3C `traceparent` or of a new one, in the record and, for jobs,
      in `request.state.traceparent`.
    - `request.state.job` and `.task`: set by handlers, in the record.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, then record it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began, request_id = 500, perf_counter(), _request_id(scope)
        headers = Headers(scope=scope).getlist("traceparent")
        traceparent = tracing.received(headers) or tracing.begun()
        scope.setdefault("state", {})["traceparent"] = traceparent

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        finally:
            _record(scope, status, perf_counter() - began, request_id)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _record(scope: Scope, status: int, seconds: float, request_id: str) -> None:
    method = scope["method"] if scope["method"] in _METHODS else "OTHER"
    route = getattr(scope.get("route"), "path", None) or "unmatched"
    REQUESTS.labels(method, route, str(status)).inc()
    REQUEST_SECONDS.labels(route).observe(seconds)
    state = scope["state"]
    fields = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
    named = naming(
        request_id=request_id,
        job_id=state.get("job"),
        task_id=state.get("task"),
        trace_id=tracing.trace_id(state["traceparent"]),
    )
    _log.info("%s %s %d in %.4f s", method, route, status, seconds, extra=fields | named)
