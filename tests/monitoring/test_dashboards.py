"""The committed Grafana files: valid queries, complete panels, all alerts.

``./scripts/check`` verifies that the files are up to date with ``scripts/dashboards``.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dashboards.files import ROOT
from tests.monitoring.promql import known_series, metric_names
from tests.monitoring.test_rules import ALERTS, promtool, rules

DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))
GRID_COLUMNS = 24
"""Width of Grafana's grid."""


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            yield path.name, panel


def queries() -> list[str]:
    return [target["expr"] for _, panel in panels() for target in panel.get("targets", [])]


def test_every_query_is_valid_promql_for_existing_metrics(tmp_path: Path) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    checked = []
    for number, query in enumerate(queries()):
        expr = query.replace("$__rate_interval", "1m").replace("$model", ".*")
        expr = expr.replace("$tenant", ".*")
        assert "$" not in expr
        assert metric_names(expr) <= known_series() | recorded, query
        checked.append({"record": f"query_{number}", "expr": expr})
    assert checked
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": checked}]}))
    promtool("check", "rules", path)


def test_panels_fit_the_grid_and_have_a_data_source() -> None:
    for path, panel in panels():
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= GRID_COLUMNS, (path, panel["title"])
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "prometheus"


def test_panel_titles_are_unique_within_a_dashboard() -> None:
    titles = [(path, panel["title"]) for path, panel in panels()]
    assert len(titles) == len(set(titles))


def test_grafana_has_every_alert() -> None:
    file = ROOT / "provisioning" / "alerting" / "tandem.yml"
    groups = yaml.safe_load(file.read_text())["groups"]
    theirs = {rule["title"]: rule for group in groups for rule in group["rules"]}
    assert theirs.keys() == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert theirs[rule["alert"]]["data"][0]["model"]["expr"] == rule["expr"]
        assert "$value " not in theirs[rule["alert"]]["annotations"]["summary"]


def test_files_that_compose_mounts_exist() -> None:
    services = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source.startswith("${") or (ROOT / source).exists(), mount
