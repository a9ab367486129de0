"""`tandem up --monitoring` for real: every metric arrives, every panel shows it, alerts fire."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.metrics import Metric, table
from cluster.monitoring import prometheus as monitoring
from tests.cluster.conftest import Running, free_ports

GRAFANA = Path(monitoring.__file__).parent / "grafana"
LOAD_S = 60.0
ARRIVES_S = 90.0
"""A replica's figures come to Prometheus within some 25 s; a busy machine takes longer."""

ABSENT = {  # what a machine without GPU, TLS, tenants or such an event has nothing to say about
    *(metric.name for metric in table.all_metrics() if "_device_" in metric.name),
    *("tandem_certificate_expiry_timestamp_seconds", "tandem_encoder_agreement_ratio"),
    *("tandem_encoder_drift_ratio", "tandem_limits_hit_total", "tandem_energy_joules_total"),
    *("tandem_cost_total", "tandem_memory_growth_bytes_per_second"),
    *("tandem_autoscaling_decisions_total", "tandem_capacity_tokens"),
}
SILENT = ("tandem_encoder_cache_hits_total",)
"""In panels that show nothing where what they show is off."""


class Prometheus:
    """Asks a Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def names(self) -> set[str]:
        answer = httpx.get(f"{self.url}/api/v1/label/__name__/values", timeout=30)
        return set(answer.json()["data"])

    def until(self, holds: Callable[[], bool], timeout_s: float = ARRIVES_S) -> bool:
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(2)
        return True

    def firing(self, alert: str) -> bool:
        return bool(self.query(f'ALERTS{{alertname="{alert}",alertstate="firing"}}'))


@pytest.fixture(scope="module")
def watched(make_cluster: Any) -> Iterator[Running]:
    """A simulated generator and the classifier, watched, after a minute of mixed load."""
    sim = {"decode_s_per_token": 0.005, "prefill_s_per_token": 0.0005}
    values = {
        "generators.smollm2.engine": "sim",
        "generators.smollm2.sim": json.dumps(sim),
        "cluster.prometheus_port": free_ports(1)[0],
    }
    words = [word for path, value in values.items() for word in ("--set", f"{path}={value}")]
    running: Running = make_cluster("--monitoring", *words)
    load(running.http_url, LOAD_S)
    yield running
    assert running.tandem("down").returncode == 0
    assert not any(p.info["name"] == "prometheus" and is_of(p, running) for p in processes())


def processes() -> list[psutil.Process]:
    return list(psutil.process_iter(["name"]))


def is_of(process: psutil.Process, running: Running) -> bool:
    try:
        return process.environ().get("TANDEM_HOME") == str(running.home)
    except psutil.Error:
        return False


def load(url: str, seconds: float) -> None:
    """Chats, streamed and not, and texts to classify, one after the other."""
    chat = {"model": "smollm2", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as client:
        while time.monotonic() < deadline:
            client.post("/v1/chat/completions", json={**chat, "stream": True})
            client.post("/v1/chat/completions", json=chat)
            client.post("/classify", json={"input": ["good", "bad", "a long and fine film"]})


@pytest.fixture(scope="module")
def prometheus(watched: Running) -> Prometheus:
    return Prometheus(watched.status()["state"]["prometheus_url"])


def series(metric: Metric) -> str:
    return f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name


def test_every_target_answers(prometheus: Prometheus) -> None:
    assert {found["metric"]["job"] for found in prometheus.query("up")} == {"ray", "ingress"}
    assert prometheus.until(lambda: not prometheus.query("up == 0"))


def test_every_metric_of_the_table_arrives(prometheus: Prometheus) -> None:
    wanted = {series(metric) for metric in table.all_metrics() if metric.name not in ABSENT}
    prometheus.until(lambda: wanted <= prometheus.names())
    assert sorted(wanted - prometheus.names()) == []


def test_every_panel_has_something_to_show(watched: Running, prometheus: Prometheus) -> None:
    panels = [
        (path.stem, panel["title"], target["expr"])
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
        if not any(name in target["expr"] for name in (*ABSENT, *SILENT, "ray_vllm_"))
    ]
    load(watched.http_url, 20)
    time.sleep(2 * monitoring.SCRAPE_INTERVAL_S)
    empty = []
    for page, title, expr in panels:
        asked = expr.replace("$__rate_interval", "5m").replace("$model", ".+")
        asked = asked.replace("$tenant", ".*")
        if not prometheus.query(asked):
            empty.append(f"{page}: {title}: {expr}")
    assert empty == []


def test_rays_dashboard_knows_prometheus(watched: Running) -> None:
    url = watched.status()["state"]["dashboard_url"]
    assert httpx.get(f"{url}/api/prometheus_health", timeout=30).status_code == 200


def test_the_rules_are_evaluated(prometheus: Prometheus) -> None:
    groups = httpx.get(f"{prometheus.url}/api/v1/rules", timeout=30).json()["data"]["groups"]
    loaded = {rule["name"] for group in groups for rule in group["rules"]}
    for path in monitoring.RULES.glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            assert {rule.get("alert") or rule["record"] for rule in group["rules"]} <= loaded
    assert not [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]


def test_a_killed_engine_fires_its_alert(watched: Running, prometheus: Prometheus) -> None:
    assert not prometheus.firing("TandemEngineDied")
    deployments = watched.status()["application"]["deployments"]
    victim = next(d for d in deployments if d["name"] == "generator-smollm2")["replicas"][0]
    psutil.Process(victim["pid"]).send_signal(signal.SIGKILL)
    assert prometheus.until(lambda: prometheus.firing("TandemEngineDied"))
