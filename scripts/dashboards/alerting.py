"""Convert Prometheus alert rules to Grafana alert rules."""

from pathlib import Path
from typing import Any

import yaml

from cluster.monitoring.prometheus import RULES
from dashboards.panels import DATA_SOURCE

FOLDER = "Tandem"


def make_alert_rules() -> str:
    """Return a Grafana provisioning file with all alerts of ``cluster/monitoring/rules``."""
    groups = [
        _convert_group(group)
        for path in sorted(Path(RULES).glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        if any("alert" in rule for rule in group["rules"])
    ]
    return yaml.safe_dump({"apiVersion": 1, "groups": groups}, sort_keys=False, width=100)


def _convert_group(group: dict[str, Any]) -> dict[str, Any]:
    rules = [_convert_rule(rule) for rule in group["rules"] if "alert" in rule]
    return {
        **{"orgId": 1, "name": group["name"], "folder": FOLDER, "interval": "30s"},
        "rules": rules,
    }


def _convert_rule(rule: dict[str, Any]) -> dict[str, Any]:
    # Prometheus fires for any result, Grafana only for a non-zero value. So make each result 1.
    query = {"expr": rule["expr"], "instant": True, "refId": "A"}
    fires = {"type": "math", "expression": "$A * 0 + 1", "refId": "B"}
    return {
        "uid": rule["alert"].lower(),
        "title": rule["alert"],
        "condition": "B",
        "data": [
            {
                "refId": "A",
                "datasourceUid": DATA_SOURCE.uid,
                "relativeTimeRange": {"from": 600, "to": 0},
                "model": query,
            },
            {"refId": "B", "datasourceUid": "__expr__", "model": fires},
        ],
        "for": rule.get("for", "0s"),
        "noDataState": "OK",
        "execErrState": "Error",
        "labels": rule["labels"],
        "annotations": {
            name: text.replace("$value", "$values.A.Value")
            for name, text in rule["annotations"].items()
        },
    }
