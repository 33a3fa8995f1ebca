"""Dashboard, rules and runbook fit each other and the metrics that the server has."""

from __future__ import annotations

import json
import re
import runpy

import pytest
import yaml

from app.metrics import EngineStatus, Metrics, ModelStatus
from tests.docker.files import DOCKER, FOREIGN, ROOT, dashboard, metrics_in, panel_queries, panels, rules


def series() -> set[str]:
    """Every series name that the server can have."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    metrics = Metrics()
    model = ModelStatus("mnist", 0, 0, 1)
    metrics.bind_engine(lambda: EngineStatus(True, False, 0.0, 0.0, 0, 0.0, [model]))
    families = metrics.registry.collect()
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, ("",))}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def test_names_of_series_are_found_in_queries() -> None:
    query = 'sum by (le, x) (rate(a_total{job="b", c=~"d|e"}[5m])) / on (f) group_left (g) (h:i > 0) and j or vector(1)'
    assert metrics_in(query) == {"a_total", "h:i", "j"}
    assert metrics_in("histogram_quantile(0.95, k_bucket)") == {"k_bucket"}


@pytest.mark.parametrize(("title", "query"), panel_queries())
def test_every_series_of_a_panel_exists(title: str, query: str) -> None:
    found = metrics_in(query)
    assert found, "a query of nothing"
    assert {name for name in found if not FOREIGN.fullmatch(name)} <= series() | recorded()


@pytest.mark.slow
def test_every_series_of_a_rule_exists() -> None:
    for rule in rules():
        names = {name for name in metrics_in(rule["expr"]) if not FOREIGN.fullmatch(name)}
        assert names <= series() | recorded(), rule


def test_every_instrument_is_shown_or_watched() -> None:
    """A metric that nobody looks at is one that nobody misses when it is wrong."""
    used = {name for _, query in panel_queries() for name in metrics_in(query)}
    used |= {name for rule in rules() for name in metrics_in(rule["expr"])}
    # Rows over rows a second is what the limit guards; the limit itself is for an autoscaler. Requests by key are none
    # where no keys are configured, as here, and every panel must have data.
    unwatched = {"ddpm_pending_nfe_limit", "ddpm_key_requests"}
    registry = Metrics().registry
    names = {family.name for family in registry.collect() if family.name.startswith("ddpm_")}
    for name in names - unwatched:
        assert any(word == name or re.fullmatch(f"{name}_(total|bucket|sum|count)", word) for word in used), name


def test_the_runbook_has_exactly_the_alerts() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    text = (ROOT / "docs" / "deploy" / "runbook.md").read_text()
    headings = re.findall(r"^### (DDPM\w+)$", text, re.M)
    assert headings == [rule["alert"] for rule in alerts], "the runbook has them in the order of the rules"
    for rule in alerts:
        assert rule["annotations"]["runbook"] == f"docs/deploy/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        section = text.split(f"### {rule['alert']}\n")[1].split("\n#")[0]
        assert len(section.split()) > 15, f"{rule['alert']}: what to do?"


def test_panels_have_ids_titles_descriptions_and_a_source() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) > 25
    provisioned = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = provisioned["datasources"][0]["uid"]
    for panel in panels():
        assert panel["title"]
        assert panel["type"] == "stat" or panel["description"].endswith(".")
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {uid}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert {variable["name"] for variable in board["templating"]["list"]} == {"model", "replica"}
    for variable in board["templating"]["list"]:
        assert metrics_in(re.findall(r"label_values\((\w+)", variable["query"])[0]) <= series()


def test_the_dashboard_is_what_its_builder_makes() -> None:
    pytest.importorskip(
        "grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed; make check-images has it"
    )
    build = runpy.run_path(str(DOCKER / "grafana" / "dashboard.py"))["build"]
    assert json.loads(build()) == dashboard(), "run python docker/grafana/dashboard.py"


def test_counters_are_asked_for_their_rate_and_never_as_they_are() -> None:
    names = {family.name + "_total" for family in Metrics().registry.collect() if family.type == "counter"}
    assert names
    for where, query in [
        *panel_queries(),
        *((rule.get("record", rule.get("alert")), rule["expr"]) for rule in rules()),
    ]:
        for name in metrics_in(query) & names:
            assert re.search(rf"(rate|increase)\({name}\{{", query), (where, name)
