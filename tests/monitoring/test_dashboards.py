"""Grafana's pages: what is committed is what the code makes, and asks only for what is counted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dashboards.__main__ import ROOT
from dashboards.files import files
from tests.monitoring.promql import known, names
from tests.monitoring.test_rules import ALERTS, promtool, rules

FILES = files()


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, text in FILES.items():
        if path.endswith(".json"):
            for panel in json.loads(text)["panels"]:
                yield path, panel


def queries() -> list[str]:
    return [target["expr"] for _, panel in panels() for target in panel.get("targets", [])]


def test_committed_files_are_what_the_code_makes() -> None:
    for path, text in FILES.items():
        assert (ROOT / path).read_text() == text, f"{path}: run `python -m dashboards`"
    committed = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    assert committed == {*FILES, "compose.yml"}


def test_every_query_is_promql_and_asks_only_for_what_is_counted(tmp_path: Path) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    checked = []
    for number, query in enumerate(queries()):
        expr = query.replace("$__rate_interval", "1m").replace("$model", ".*")
        expr = expr.replace("$tenant", ".*")
        assert "$" not in expr
        assert names(expr) <= known() | recorded, query
        checked.append({"record": f"query_{number}", "expr": expr})
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": checked}]}))
    promtool("check", "rules", path)


def test_panels_have_room_and_a_source() -> None:
    for path, panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, (path, panel["title"])
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "prometheus"


def test_every_alert_is_grafanas_too() -> None:
    groups = yaml.safe_load(FILES["provisioning/alerting/tandem.yml"])["groups"]
    theirs = {rule["title"]: rule for group in groups for rule in group["rules"]}
    assert theirs.keys() == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert theirs[rule["alert"]]["data"][0]["model"]["expr"] == rule["expr"]
        assert "$value " not in theirs[rule["alert"]]["annotations"]["summary"]


def test_what_compose_mounts_is_there() -> None:
    services = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]
    for service in services.values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source.startswith("${") or (ROOT / source).exists(), mount
