"""The metrics that a rehearsal of the deployment expects (deploy/rehearse.py)."""

from __future__ import annotations

EMPTY = {"Alerts"}
"""Panels of the dashboard that are empty while no alert is pending or firing."""
COUNTED = {
    "requests": 'sum(vouchsafe_http_requests_total{route="/predict",status="200"})',
    "timed requests": 'sum(vouchsafe_http_request_duration_seconds_count{route="/predict"})',
    "problems": 'sum(vouchsafe_rejections_total{reason="unauthorized"})',
    "answers": "sum(vouchsafe_predictions_total)",
    "waits in the queue": "sum(vouchsafe_job_queue_duration_seconds_count)",
    "certified radii and abstentions": "sum(vouchsafe_certified_radius_count) + "
    '(sum(vouchsafe_predictions_total{outcome="abstained"}) or vector(0))',
    "rows": "sum(vouchsafe_rows_total)",
    "batches": "sum(vouchsafe_batches_total)",
    "timed batches": "sum(vouchsafe_batch_duration_seconds_count)",
    "rows in batches": "sum(vouchsafe_batch_rows_sum)",
    "shards committed": 'sum(vouchsafe_shards_total{outcome="committed"})',
    "tasks made": 'sum(vouchsafe_adaptations_total{outcome="ready"})',
    "seconds of adaptation": "sum(vouchsafe_adaptation_seconds_sum)",
    "most rows queued": "max(max_over_time(vouchsafe_queue_rows[10m]))",
    "most adaptations open": "max(max_over_time(vouchsafe_adaptations_open[10m]))",
    "most progress": "max(max_over_time(vouchsafe_adaptation_progress[10m]) >= 0)",
}
"""Queries whose values must grow while predictions are made and a task is adapted."""
STEADY = {
    "workers": ("max(vouchsafe_workers)", 2.0),
    "processes that reach Redis": ("sum(vouchsafe_engine_up)", 3.0),
    "Redis writes its files": ("min(vouchsafe_redis_persistence_up)", 1.0),
    "processes of this release": ("count(vouchsafe_build_info)", 3.0),
    "rows queued": ("sum(max by (priority) (vouchsafe_queue_rows))", 0.0),
    "age of the oldest": ("max(vouchsafe_queue_oldest_seconds)", 0.0),
    "shards given up": ("max(vouchsafe_dead_letters_total)", 0.0),
}
"""Queries with the values that they must have once no job is open."""
