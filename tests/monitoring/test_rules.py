"""Rules are valid and behave as their cases say; each alert has a runbook."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring.prometheus import RULES, Targets, configuration
from tests.monitoring.fast_rules import speed_up
from tests.monitoring.promql import known_series, metric_names

ROOT = Path(__file__).parents[2]
CASES = sorted(Path(__file__).parent.glob("*.yml"))


def promtool(*args: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run(
        ["promtool", *args], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    groups = [
        group
        for path in sorted(RULES.glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]


def test_rules_are_valid() -> None:
    promtool("check", "rules", *sorted(RULES.glob("*.yml")))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_alerts_fire_as_the_cases_say(case: Path) -> None:
    promtool("test", "rules", case.name, cwd=case.parent)


def test_each_alert_has_a_case_that_fires_it_and_one_that_does_not() -> None:
    cases = [
        check
        for path in CASES
        for test in yaml.safe_load(path.read_text())["tests"]
        for check in test["alert_rule_test"]
    ]
    fired = {check["alertname"] for check in cases if check["exp_alerts"]}
    silent = {check["alertname"] for check in cases if not check["exp_alerts"]}
    assert fired == silent == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_has_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    page = ROOT / rule["annotations"]["runbook_url"]
    text = page.read_text()
    assert f"`{rule['alert']}`" in text
    for heading in ("## What it means", "## How to check", "## What to do"):
        assert heading in text


def test_every_runbook_belongs_to_an_alert() -> None:
    pages = {f"docs/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert pages == {rule["annotations"]["runbook_url"] for rule in ALERTS}


def test_rules_use_existing_metrics() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        assert metric_names(rule["expr"]) <= known_series() | recorded, rule["expr"]


def test_fast_rules_differ_in_durations_only(tmp_path: Path) -> None:
    for path in RULES.glob("*.yml"):
        text = path.read_text()
        fast = speed_up(text, 15)
        assert fast != text
        assert re.sub(r"\b\d+[smhd]\b", "", fast) == re.sub(r"\b\d+[smhd]\b", "", text)
        (tmp_path / path.name).write_text(fast)
    promtool("check", "rules", *sorted(tmp_path.glob("*.yml")))
    service = yaml.safe_load((tmp_path / "service.yml").read_text())
    shedding = next(r for r in service["groups"][0]["rules"] if r["alert"] == "TandemShedding")
    assert shedding["for"] == "20s"


@pytest.mark.parametrize("ingress", [None, "127.0.0.1:8000"])
def test_the_configuration_of_prometheus_is_valid(tmp_path: Path, ingress: str | None) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    targets = Targets("http://127.0.0.1:8265", ingress, str(token))
    path = tmp_path / "prometheus.yml"
    path.write_text(configuration(targets, [str(RULES / "*.yml")]))
    promtool("check", "config", path)
    jobs = yaml.safe_load(path.read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["ray", "ingress"][: 1 + (ingress is not None)]
