"""The Grafana dashboard: `python -m deploy.monitoring.dashboard` writes dashboard.json.

Change panels in panels.py, not in the JSON. Grafana queries the Prometheus that the dashboard's
`datasource` variable names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.monitoring.panels import ROWS, Panel

PATH = Path(__file__).with_name("dashboard.json")
SCHEMA_VERSION = 39
"""The schema of Grafana 10.4; later releases migrate it when they load the dashboard."""
COLUMNS, HEIGHT = 24, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """Return the document that Grafana reads."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place})
        panels[-1] |= {"collapsed": False, "panels": []}
        left, top = 0, top + 1
        for panel in row:
            if left + panel.width > COLUMNS:
                left, top = 0, top + HEIGHT
            place = {"x": left, "y": top, "w": panel.width, "h": HEIGHT}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_drawn(panel)})
            left += panel.width
        top += HEIGHT
    return {
        "uid": "vouchsafe",
        "title": "Vouchsafe",
        "tags": ["vouchsafe"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _task()]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def _drawn(panel: Panel) -> dict[str, Any]:
    """Return a panel in Grafana's format, without its id and place."""
    steps = [{"value": value, "color": color} for value, color in panel.steps]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute"}, "min": 0}
    defaults["thresholds"]["steps"] = steps
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "auto"}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        fill = 20 if panel.stacked else 0
        defaults["custom"] = {"fillOpacity": fill, "showPoints": "never", "stacking": stacking}
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        options = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    targets = [
        {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query, "legendFormat": legend}
        for at, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _datasource() -> dict[str, Any]:
    named = {"name": "datasource", "label": "Prometheus", "type": "datasource"}
    return {**named, "query": "prometheus", "current": {}, "hide": 0, "refresh": 1}


def _task() -> dict[str, Any]:
    query = "label_values(vouchsafe_predictions_total, task)"
    chosen = {"includeAll": True, "multi": True, "allValue": ".*"}
    every = {"text": ["All"], "value": ["$__all"]}
    named = {"name": "task", "label": "Task", "type": "query", "datasource": SOURCE}
    query_of = {"query": {"query": query, "refId": "task"}, "refresh": 2, "sort": 1}
    return {**named, **query_of, **chosen, "current": every, "hide": 0}


if __name__ == "__main__":
    PATH.write_text(json.dumps(dashboard(), indent=1) + "\n")
