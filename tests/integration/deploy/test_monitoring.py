"""deploy/monitoring: rules that fire when they must, and metrics that are there to be asked for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.monitoring.dashboard import COLUMNS, PATH, dashboard
from deploy.monitoring.panels import ROWS, filled_in
from service.engine.protocol import EngineStats, PriorityState
from service.jobs import Mode
from service.operations.metrics import exposition
from tests.support.paths import ROOT

MONITORING = ROOT / "deploy" / "monitoring"
RULES = MONITORING / "alerts.yml"
RULE_TESTS = sorted((MONITORING / "tests").glob("*.yml"))
PAGE = ROOT / "docs" / "alerts.md"
PROMETHEUS_OWN = {"up", "ALERTS"}
UNITS = {"reqps", "ops", "s", "short", "percentunit", "none", "bytes", "bool_yes_no"}
"""Units of Grafana's own list that are in use."""


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
QUERIES = [query for row in ROWS.values() for panel in row for query in panel.queries.values()]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603


def names_of(query: str) -> set[str]:
    """The metrics that a query asks for: its words, but for labels, functions and operators."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", query)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\boffset\s+\w+", "", bare)
    words = set(re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", bare))
    return words - {"and", "or", "unless"}


def exposed() -> set[str]:
    """The names of all samples that processes of a fleet can show."""
    lanes = {mode.priority: PriorityState(0, 0.0) for mode in Mode}
    text = exposition(EngineStats(lanes, 0.0, 0, 0, True), 0)
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        family.name + suffix
        for family in text_string_to_metric_families(text.decode())
        for suffix in suffixes.get(family.type, [""])
    }


def test_names_of_a_query_are_found() -> None:
    """A metric's name is told from labels, functions, ranges and operators."""
    query = (
        'sum by (le, task) (rate(a_bucket{le="c", d=~"e"}[5m])) / on (f) g:h:i offset 1h '
        'unless max(j) == 0 or vector(1) and k{l="m"} > 1e3'
    )
    assert names_of(query) == {"a_bucket", "g:h:i", "j", "k"}


@pytest.mark.parametrize("query", [rule["expr"] for rule in rules()] + QUERIES)
def test_metrics_exist(query: str) -> None:
    """Whatever an alert or the dashboard asks for is exposed, recorded, or Prometheus's own."""
    names = names_of(query)
    assert names
    assert names <= exposed() | RECORDED | PROMETHEUS_OWN


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_alerts_are_explained(rule: dict[str, Any]) -> None:
    """An alert has a severity, a summary, a description, a section of the page and a test."""
    assert rule["labels"]["severity"] in ("critical", "warning")
    told = rule["annotations"]
    assert told["summary"]
    assert told["description"].endswith(".")
    assert told["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"
    assert f"\n## {rule['alert']}\n" in PAGE.read_text()
    tests = "".join(path.read_text() for path in RULE_TESTS)
    assert re.search(rf'alertname(: |="){rule["alert"]}\b', tests)


def test_page_explains_no_other() -> None:
    """Every alert that the page has is a rule."""
    sections = re.findall(r"^## (Vouchsafe\w+)$", PAGE.read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(rule["alert"] for rule in ALERTS)


def test_rules_are_sound(prometheus_programs: None) -> None:
    """promtool reads the rules and the settings of Prometheus."""
    for checked in (
        promtool("check", "rules", RULES),
        promtool("check", "config", "--syntax-only", MONITORING / "prometheus.yml"),
    ):
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_rules_fire_when_they_must(prometheus_programs: None) -> None:
    """Each alert fires on what it is for, and not on less, on nothing or on NaN."""
    tested = promtool("test", "rules", *RULE_TESTS)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("expression", ["vector(1) < 0", "vector(1)"], ids=["never", "always"])
def test_rule_tests_notice(expression: str, prometheus_programs: None, tmp_path: Path) -> None:
    """The tests of the rules tell of each alert that never fires, and of each that always does."""
    changed = yaml.safe_load(RULES.read_text())
    for group in changed["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = expression
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(changed))
    copies = shutil.copytree(MONITORING / "tests", tmp_path / "tests")
    tested = promtool("test", "rules", *copies.glob("*.yml"))
    assert tested.returncode == 1
    told = set(re.findall(r'alertname(?:="|: )(\w+)', tested.stdout + tested.stderr))
    assert told == {rule["alert"] for rule in ALERTS}


def test_prometheus_finds_the_fleet() -> None:
    """The names and ports that Prometheus asks are those of the compose file's services."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    reached = {
        alias: name
        for name, service in services.items()
        for alias in (name, *_aliases(service.get("networks", {})))
    }
    for job in settings["scrape_configs"]:
        (found,) = job["dns_sd_configs"]
        for name in found["names"]:
            probe = services[reached[name]]["healthcheck"]["test"]
            assert str(found["port"]) in probe
    secret = Path(settings["scrape_configs"][0]["authorization"]["credentials_file"])
    assert secret.parent == Path("/run/secrets")
    assert secret.name in services["prometheus"]["secrets"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    """What provisions Grafana names the compose file's Prometheus, and where the dashboard is."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    places = {Path(v["source"]).name: v["target"] for v in services["grafana"]["volumes"]}
    assert places["grafana"] == "/etc/grafana/provisioning"
    provisioning = MONITORING / "grafana"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "vouchsafe.yml").read_text())[
        "providers"
    ]
    assert Path(places[PATH.name]).parent == Path(provider["options"]["path"])
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    host, port = source["url"].removeprefix("http://").split(":")
    assert any(published.endswith(f":{port}") for published in services[host]["ports"])


def _aliases(networks: Any) -> list[str]:
    if isinstance(networks, list):
        return []
    return [alias for network in networks.values() for alias in (network or {}).get("aliases", [])]


# The dashboard


def test_dashboard_is_the_panels() -> None:
    """dashboard.json is what `python -m deploy.monitoring.dashboard` writes."""
    assert json.loads(PATH.read_text()) == dashboard()


def test_dashboard_is_whole() -> None:
    """Ids are unique, no panel lies over another, each has a unit, and asks what was chosen."""
    told = dashboard()
    panels = [panel for panel in told["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in told["panels"]}) == len(told["panels"])
    for one, other in combinations([panel["gridPos"] for panel in told["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= COLUMNS
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {source["uid"] for source in sources} == {"${datasource}"}
    variables = {variable["name"] for variable in told["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(told))) - {"__rate_interval", "__all"}
    assert used == variables


def test_queries_of_the_dashboard_are_sound(prometheus_programs: None, tmp_path: Path) -> None:
    """promtool reads every query of the dashboard."""
    recorded = [
        {"record": f"query:{at}", "expr": filled_in(query)} for at, query in enumerate(QUERIES)
    ]
    rules = tmp_path / "queries.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    checked = promtool("check", "rules", rules)
    assert checked.returncode == 0, checked.stdout + checked.stderr
