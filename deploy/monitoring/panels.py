"""The dashboard's rows, their panels, and the panels' queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW = "[$__rate_interval]"
OF_TASK = '{task=~"$task"}'
ABSTAINED = '{task=~"$task",outcome="abstained"}'
PROBES = 'route!~"/livez|/readyz|/startupz|/metrics"'


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of `width` columns: `queries` maps a legend (Grafana's format) to PromQL.

    `steps` color the value: pairs of a lower bound and a color; the first has no bound.
    """

    title: str
    queries: dict[str, str]
    unit: str
    about: str = ""
    kind: str = "timeseries"
    width: int = 6
    stacked: bool = False
    steps: Sequence[tuple[float | None, str]] = field(default=((None, "green"),))
    maximum: float | None = None


def quantiles(metric: str, *shares: float, where: str = "") -> dict[str, str]:
    """Return queries for quantiles of a histogram over all processes, by legend."""
    buckets = f"sum by (le) (rate({metric}_bucket{where}{WINDOW}))"
    return {f"p{share * 100:g}": f"histogram_quantile({share:g}, {buckets})" for share in shares}


def mean(metric: str) -> str:
    """Return a query for the mean of a histogram's observations over all processes."""
    return f"sum(rate({metric}_sum{WINDOW})) / sum(rate({metric}_count{WINDOW}))"


def filled_in(query: str) -> str:
    """Return a query with Grafana's variables replaced: all tasks, over five minutes."""
    return query.replace("$__rate_interval", "5m").replace("$task", ".*")


RED_AT_0 = ((None, "red"), (1.0, "green"))
RED_AT_1 = ((None, "green"), (1.0, "red"))
ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Requests by status",
            {
                "{{status}}": "sum by (status) "
                f"(rate(vouchsafe_http_requests_total{{{PROBES}}}{WINDOW}))"
            },
            "reqps",
            "Without the probes. 503: rejected by admission. 504: answered after the deadline.",
            stacked=True,
        ),
        Panel(
            "Time to answer a prediction",
            quantiles(
                "vouchsafe_http_request_duration_seconds",
                0.5,
                0.95,
                0.99,
                where='{route="/predict"}',
            ),
            "s",
            "Includes rejections and respond-async, which are quick.",
        ),
        Panel(
            "Answers by task and mode",
            {
                "{{task}}, {{mode}}": "sum by (task, mode) "
                f"(rate(vouchsafe_predictions_total{OF_TASK}{WINDOW}))"
            },
            "ops",
        ),
        Panel(
            "Problems by type",
            {"{{reason}}": f"sum by (reason) (rate(vouchsafe_rejections_total{WINDOW}))"},
            "ops",
            "The last part of the problem document's `type`.",
            stacked=True,
        ),
    ],
    "Queue": [
        Panel(
            "Workers alive",
            {"workers": "max(vouchsafe_workers)"},
            "short",
            kind="stat",
            width=3,
            steps=RED_AT_0,
        ),
        Panel(
            "Rows waiting or leased",
            {"{{priority}}": "max by (priority) (vouchsafe_queue_rows)"},
            "short",
            "hi is PREDICT, lo is CERTIFY. No line: Redis is down.",
            width=7,
            stacked=True,
        ),
        Panel(
            "Oldest shard that waits",
            {"{{priority}}": "max by (priority) (vouchsafe_queue_oldest_seconds)"},
            "s",
            "Since its job was accepted.",
            width=7,
        ),
        Panel(
            "From acceptance to the first row",
            quantiles("vouchsafe_job_queue_duration_seconds", 0.5, 0.99),
            "s",
            width=7,
        ),
    ],
    "Device": [
        Panel(
            "Rows computed a second",
            {
                "{{instance}}": f"sum by (instance) (rate(vouchsafe_rows_total{OF_TASK}{WINDOW}))",
                "as the engine measures": "max(vouchsafe_queue_rows_per_second)",
            },
            "short",
            "Retry-After is computed from the engine's figure.",
        ),
        Panel(
            "Time to compute a batch",
            quantiles("vouchsafe_batch_duration_seconds", 0.5, 0.99),
            "s",
        ),
        Panel(
            "In a batch",
            {"rows": mean("vouchsafe_batch_rows"), "jobs": mean("vouchsafe_batch_jobs")},
            "short",
            "Means. Few rows a batch: little work, or work for many tasks.",
        ),
        Panel(
            "Padding",
            {
                "share of the rows computed": f"sum(rate(vouchsafe_padding_rows_total{WINDOW})) / "
                f"(sum(rate(vouchsafe_padding_rows_total{WINDOW}))"
                f" + sum(rate(vouchsafe_rows_total{WINDOW})))"
            },
            "percentunit",
            maximum=1,
        ),
        Panel(
            "Batches by task",
            {"{{task}}": f"sum by (task) (rate(vouchsafe_batches_total{OF_TASK}{WINDOW}))"},
            "ops",
        ),
        Panel(
            "Shards by outcome",
            {"{{outcome}}": f"sum by (outcome) (rate(vouchsafe_shards_total{WINDOW}))"},
            "ops",
            "refused: counted before, or of an ended job. released: returned uncomputed.",
        ),
        Panel(
            "Memory by process",
            {"{{instance}}": 'process_resident_memory_bytes{job=~"vouchsafe-.+"}'},
            "bytes",
            "Resident memory, without the GPU's.",
        ),
        Panel(
            "Cores by process",
            {"{{instance}}": f'rate(process_cpu_seconds_total{{job=~"vouchsafe-.+"}}{WINDOW})'},
            "short",
            "Without the processes of adaptation jobs.",
        ),
    ],
    "Certificates": [
        Panel(
            "Abstentions",
            {
                "{{task}}, {{mode}}": "(sum by (task, mode) "
                f"(rate(vouchsafe_predictions_total{ABSTAINED}{WINDOW})) "
                "or 0 * sum by (task, mode) "
                f"(rate(vouchsafe_predictions_total{OF_TASK}{WINDOW}))) / sum by (task, mode) "
                f"(rate(vouchsafe_predictions_total{OF_TASK}{WINDOW}))"
            },
            "percentunit",
            "Share of the answers without a label.",
            width=8,
            maximum=1,
        ),
        Panel(
            "Certified radius",
            quantiles("vouchsafe_certified_radius", 0.1, 0.5, 0.9),
            "none",
            "l2, for pixels in [0, 1]; of all tasks together, between the histogram's bounds.",
            width=8,
        ),
        Panel(
            "Abstentions, this hour and this day",
            {
                "{{task}}, {{mode}}, hour": "task_mode:vouchsafe_abstentions:ratio1h" + OF_TASK,
                "{{task}}, {{mode}}, day": "task_mode:vouchsafe_abstentions:ratio1d" + OF_TASK,
            },
            "percentunit",
            "The alert VouchsafeAbstentionShift compares these.",
            width=8,
            maximum=1,
        ),
    ],
    "Adaptation": [
        Panel(
            "Jobs queued or running",
            {"jobs": "max(vouchsafe_adaptations_open)"},
            "short",
            kind="stat",
            width=4,
        ),
        Panel(
            "Progress of the running job",
            {"{{instance}}": "vouchsafe_adaptation_progress"},
            "percentunit",
            "No line: no job runs there.",
            width=7,
            maximum=1,
        ),
        Panel(
            "Jobs that ended, by the hour",
            {"{{outcome}}": "sum by (outcome) (increase(vouchsafe_adaptations_total[1h]))"},
            "short",
            width=6,
        ),
        Panel(
            "Mean time from a job's first start to its end",
            {
                "mean of a day": "sum(increase(vouchsafe_adaptation_seconds_sum[1d])) / "
                "sum(increase(vouchsafe_adaptation_seconds_count[1d]))"
            },
            "s",
            width=7,
        ),
    ],
    "Redis and health": [
        Panel(
            "Redis answers",
            {"{{instance}}": "vouchsafe_engine_up"},
            "bool_yes_no",
            kind="stat",
            width=5,
            steps=RED_AT_0,
        ),
        Panel(
            "Redis writes its files",
            {"written": "max(vouchsafe_redis_persistence_up)"},
            "bool_yes_no",
            kind="stat",
            width=3,
            steps=RED_AT_0,
        ),
        Panel(
            "Shards given up in a day",
            {"shards": "max(increase(vouchsafe_dead_letters_total[1d]))"},
            "short",
            kind="stat",
            width=3,
            steps=RED_AT_1,
        ),
        Panel(
            "Processes that answer Prometheus",
            {"{{job}} {{instance}}": 'up{job=~"vouchsafe-.+"}'},
            "bool_yes_no",
            kind="stat",
            width=6,
            steps=RED_AT_0,
        ),
        Panel(
            "Processes by release",
            {"{{version}}": "count by (version) (vouchsafe_build_info)"},
            "short",
            kind="stat",
            width=3,
        ),
        Panel(
            "Alerts",
            {"{{alertname}} ({{alertstate}})": 'ALERTS{alertname=~"Vouchsafe.+"}'},
            "none",
            "Empty: no alert is pending or firing.",
            width=4,
            maximum=1,
        ),
    ],
}
