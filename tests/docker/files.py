"""What the tests of docker/ read: queries, rules, metric names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
RULES = sorted((DOCKER / "prometheus" / "rules").glob("*.yml"))
# What Prometheus itself and the balancer bring, and prometheus_client's collector of the process.
FOREIGN = re.compile(r"up|ALERTS|prometheus_notifications_dropped_total|haproxy_\w+|process_\w+")


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "ddpm.json").read_text())
    return loaded


def panels() -> list[dict[str, Any]]:
    """Those that show something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def panel_queries() -> list[tuple[str, str]]:
    """Title and query of every panel's every line."""
    return [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def metrics_in(expression: str) -> set[str]:
    """Names of the series that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    words = re.findall(r"[a-zA-Z_:][\w:]*(?!\w*\s*\()", bare)
    functions = set(re.findall(r"([a-zA-Z_]\w*)\s*\(", bare))
    return {word for word in words if word not in functions | {"and", "or", "unless", "bool", "sum", "count", "group"}}
