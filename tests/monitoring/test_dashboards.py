"""Grafana's files, as committed: valid queries for existing metrics, and all alerts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dashboards.__main__ import ROOT
from dashboards.files import files
from tests.monitoring.promql import known_series, metric_names
from tests.monitoring.test_rules import ALERTS, promtool, rules


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(ROOT.rglob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            yield path.name, panel


def queries() -> list[str]:
    return [target["expr"] for _, panel in panels() for target in panel.get("targets", [])]


def test_committed_files_are_up_to_date() -> None:
    generated = files()
    for path, text in generated.items():
        assert (ROOT / path).read_text() == text, f"{path}: run `python -m dashboards`"
    committed = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    assert committed == {*generated, "compose.yml"}


def test_queries_are_valid_and_use_existing_metrics(tmp_path: Path) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    checked = []
    for number, query in enumerate(queries()):
        expr = query.replace("$__rate_interval", "1m").replace("$model", ".*")
        expr = expr.replace("$tenant", ".*")
        assert "$" not in expr
        assert metric_names(expr) <= known_series() | recorded, query
        checked.append({"record": f"query_{number}", "expr": expr})
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": checked}]}))
    promtool("check", "rules", path)


def test_panels_fit_the_grid_and_have_a_data_source() -> None:
    for path, panel in panels():
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24, (path, panel["title"])
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "prometheus"


def test_every_alert_rule_exists_in_grafana() -> None:
    groups = yaml.safe_load((ROOT / "provisioning/alerting/tandem.yml").read_text())["groups"]
    grafana_rules = {rule["title"]: rule for group in groups for rule in group["rules"]}
    assert grafana_rules.keys() == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert grafana_rules[rule["alert"]]["data"][0]["model"]["expr"] == rule["expr"]
        assert "$value " not in grafana_rules[rule["alert"]]["annotations"]["summary"]


def test_files_mounted_by_compose_exist() -> None:
    services = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source.startswith("${") or (ROOT / source).exists(), mount
