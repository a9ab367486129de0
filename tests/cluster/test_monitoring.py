"""`tandem up --monitoring`: all metrics reach Prometheus, all panels have data, alerts fire."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.ports import free_ports
from cluster.launch.prometheus import executable
from cluster.metrics import Metric, table
from cluster.monitoring import prometheus as monitoring
from tests.cluster.conftest import RunningCluster, router_config, serve_config, sim_generator
from tests.cluster.ray_charts import Browser, documented_panels, panels_with_data
from tests.monitoring.fast_rules import speed_up

GRAFANA = Path(monitoring.__file__).parent / "grafana"
FLOODED, LEAKING = "flooded", "leaking"
REAL = {
    "name": "real",
    "model": "smollm2-135m-instruct",
    "max_model_len": 512,
    "kv_cache_memory_bytes": "64MiB",
    "resources": {"cpus": 0.1},
}
"""Generator with vLLM, for its metrics."""
SCALES_FROM_ZERO = {"min": 0, "max": 1, "target_in_flight": 8}
LOAD_S = 60.0
TIMEOUT_S = 90.0
"""Metrics reach Prometheus within about 25 s; a busy machine takes longer."""

SPEED_UP = 15.0
"""Factor by which the durations in the rules are shortened: 15 minutes become 1 minute."""
SCRAPE_S = 5
"""The shortest window, 20 s, contains several scrapes."""

CONDITIONS = {
    "tandem_device_": "a GPU",
    "tandem_rollout_": "a rollout (tests/cluster/test_rollout.py)",
    "tandem_guard_": "guards (tests/cluster/test_guards.py)",
    "tandem_task": "typed tasks (tests/serve/test_tasks.py)",
    "tandem_knowledge_": "knowledge bases (tests/serve/test_knowledge.py)",
    "tandem_batch": "batches (tests/serve/test_batches.py)",
    "tandem_auto_": "the section `auto` (tests/serve/test_model_choice.py)",
    "tandem_model_fallbacks_": "`fallbacks` (tests/serve/test_model_choice.py)",
    "tandem_budget_": "API keys with budgets (tests/serve/test_budgets.py)",
}
"""What metrics that are absent here require, by their prefix."""
ABSENT = {
    **{
        metric.name: condition
        for metric in table.all_metrics()
        for prefix, condition in CONDITIONS.items()
        if metric.name.startswith(prefix)
    },
    "tandem_certificate_expiry_timestamp_seconds": "TLS between the nodes",
    "tandem_classifier_agreement_ratio": "a CPU with a lower precision than float32",
    "tandem_classifier_drift_ratio": "a classifier with a reference (`tandem models reference`)",
    "tandem_budget_spent_ratio": "a budget in the key file",
    "tandem_budget_state": "a budget in the key file",
    "tandem_limits_hit_total": "API keys; without them, /metrics needs no key",
}
"""Metrics that are absent here, and what they require."""


def config() -> dict[str, Any]:
    """Return generators (normal, overloaded, leaking) and a classifier."""
    sim = {"decode_s_per_token": 0.005, "prefill_s_per_token": 0.0005}
    slow = {"decode_s_per_token": 0.05, "max_num_seqs": 2}
    sentiment = {
        "name": "sentiment",
        "model": "sentiment-minilm",
        "resources": {"cpus": 0.25},
        "result_cache": {"max_bytes": "1MiB"},
    }
    return serve_config(
        generators=[
            sim_generator(name="smollm2", sim=sim),
            # Its first request makes the autoscaler start a replica. Enough requests wait in the
            # engine for the router to learn its capacity.
            sim_generator(name=FLOODED, sim=slow, max_in_flight=12, replicas=SCALES_FROM_ZERO),
            sim_generator(name=LEAKING, sim={"leak_bytes_per_request": "64KiB"}),
            REAL,
        ],
        classifiers=[sentiment],
        router=router_config(1, max_queued=4),
        accounting={"watts_per_core": 10, "per_cpu_hour": 0.05},
        leaks={"sample_s": 1, "window_s": 30, "settle_s": 0, "min_growth_bytes": "1MiB"},
        cluster=dict(zip(("prometheus_port", "grafana_port"), free_ports(2), strict=True)),
    )


class Prometheus:
    """Client of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def metric_names(self) -> set[str]:
        answer = httpx.get(f"{self.url}/api/v1/label/__name__/values", timeout=30)
        return set(answer.json()["data"])

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(2)
        return True

    def is_firing(self, alert: str, **labels: str) -> bool:
        wanted = {"alertname": alert, "alertstate": "firing", **labels}
        matchers = ",".join(f'{name}="{value}"' for name, value in wanted.items())
        return bool(self.query(f"ALERTS{{{matchers}}}"))


@pytest.fixture(scope="module")
def started(
    make_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(yaml.safe_dump(config()), encoding="utf-8")
    running: RunningCluster = make_cluster("--monitoring", "--config", str(file))
    yield running
    assert running.tandem("down").returncode == 0
    assert not any(p.info["name"] == "prometheus" and belongs_to(p, running) for p in processes())


@pytest.fixture(scope="module")
def fast_prometheus(
    started: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Start a second Prometheus for the cluster, with shorter durations in its rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    for path in monitoring.RULES.glob("*.yml"):
        (folder / path.name).write_text(speed_up(path.read_text(), SPEED_UP))
    targets = monitoring.Targets(started.status()["state"]["dashboard_url"], None)
    settings = yaml.safe_load(monitoring.configuration(targets, [str(folder / "*.yml")]))
    settings["global"] = {
        "scrape_interval": f"{SCRAPE_S}s",
        "evaluation_interval": f"{SCRAPE_S}s",
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [
        executable(),
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with subprocess.Popen(command) as process:
        yield Prometheus(f"http://{address}")
        process.terminate()


@pytest.fixture(scope="module")
def overload(started: RunningCluster, fast_prometheus: Prometheus) -> Iterator[None]:
    """Send more requests than one pool can serve, and some to the leaking one, until the end."""
    done = threading.Event()
    clients = [(FLOODED, 0.2)] * 20 + [(LEAKING, 0.25)]
    with ThreadPoolExecutor(len(clients)) as pool:
        requests = [
            pool.submit(send_repeatedly, started.http_url, done, *client) for client in clients
        ]
        yield
        done.set()
    for request in requests:
        request.result()


def send_repeatedly(url: str, done: threading.Event, model: str, pause_s: float) -> None:
    """Send one request after another, whatever its status, with a pause in between."""
    body = {"model": model, "prompt": "a b c", "max_tokens": 16}
    with httpx.Client(base_url=url, timeout=60) as client:
        while not done.wait(pause_s):
            client.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def loaded(started: RunningCluster, overload: None) -> RunningCluster:
    """Return the cluster after a minute of mixed load; the overload continues."""
    send_mixed_load(started.http_url, LOAD_S)
    return started


def processes() -> list[psutil.Process]:
    return list(psutil.process_iter(["name"]))


def belongs_to(process: psutil.Process, running: RunningCluster) -> bool:
    try:
        return process.environ().get("TANDEM_HOME") == str(running.home)
    except psutil.Error:
        return False


def send_mixed_load(url: str, seconds: float) -> None:
    """Send chats, streamed and whole, and texts to classify, one after another."""
    chat = {"model": "smollm2", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
    # Longer than one block of the KV cache, so that the prefix cache has hits.
    long = {"model": "real", "max_tokens": 16, "prompt": "one two three four " * 60}
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60) as client:
        while (now := time.monotonic()) < deadline:
            client.post("/v1/chat/completions", json={**chat, "stream": True})
            client.post("/v1/chat/completions", json=chat)
            client.post("/v1/completions", json=long)
            client.post("/classify", json={"input": ["good", "bad", f"the film of {now}"]})


@pytest.fixture(scope="module")
def prometheus(loaded: RunningCluster) -> Prometheus:
    return Prometheus(loaded.status()["state"]["prometheus_url"])


def series(metric: Metric) -> str:
    return f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name


def test_every_target_is_up(prometheus: Prometheus) -> None:
    assert {found["metric"]["job"] for found in prometheus.query("up")} == {"ray", "ingress"}
    assert prometheus.wait_until(lambda: not prometheus.query("up == 0"))


def test_every_metric_reaches_prometheus(prometheus: Prometheus) -> None:
    wanted = {series(metric) for metric in table.all_metrics() if metric.name not in ABSENT}
    prometheus.wait_until(lambda: wanted <= prometheus.metric_names())
    assert sorted(wanted - prometheus.metric_names()) == []


def test_every_panel_has_data(loaded: RunningCluster, prometheus: Prometheus) -> None:
    panels = [
        (path.stem, panel["title"], target["expr"])
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
        if not any(name in target["expr"] for name in (*ABSENT, "ray_vllm_num_preemptions_"))
    ]
    send_mixed_load(loaded.http_url, 20)
    time.sleep(2 * monitoring.SCRAPE_INTERVAL_S)
    empty = []
    for page, title, expr in panels:
        query = expr.replace("$__rate_interval", "5m").replace("$model", ".+")
        query = query.replace("$tenant", ".*")
        if not prometheus.query(query):
            empty.append(f"{page}: {title}: {expr}")
    assert empty == []


def test_startup_phases_add_up(prometheus: Prometheus) -> None:
    def took(*phases: str) -> float:
        query = f'tandem_startup_seconds{{model="{FLOODED}",phase=~"{"|".join(phases)}"}}'
        found = {one["metric"]["phase"]: float(one["value"][1]) for one in prometheus.query(query)}
        return sum(found.values()) if found.keys() == set(phases) else float("nan")

    assert prometheus.wait_until(lambda: took("decision") > 0)
    assert took("scheduling", "start", "notice") == pytest.approx(took("decision"))
    assert took("process", "replica") == pytest.approx(took("start"))
    assert took("imports", "model", "link") == pytest.approx(took("replica"))


def test_rays_dashboard_finds_prometheus(loaded: RunningCluster) -> None:
    url = loaded.status()["state"]["dashboard_url"]
    assert httpx.get(f"{url}/api/prometheus_health", timeout=30).status_code == 200


@pytest.fixture(scope="module")
def browser(loaded: RunningCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    url = loaded.status()["state"]["dashboard_url"]
    opened = Browser(url, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


def test_rays_dashboard_shows_charts(loaded: RunningCluster, browser: Browser) -> None:
    replica = next(r for r, (name, _) in loaded.replicas().items() if name == "generator-smollm2")
    pages = {
        "#/overview": {"Cluster Utilization": ["Cluster Utilization"]},
        "#/metrics": {"Core Dashboard": ["Cluster Utilization", "Node Count", "Node CPU Usage"]},
        "#/serve": {
            name: [name] for name in ("QPS per application", "P90 latency per application")
        },
        "#/serve/system": {"Ongoing HTTP Requests": ["Ongoing HTTP Requests"]},
        f"#/serve/applications/tandem/generator-smollm2/{replica}": {
            name: [name] for name in ("QPS per replica", "P90 latency per replica")
        },
    }
    for address, frames in pages.items():
        browser.open(address)
        browser.wait_for_frames(frames)
        browser.save(address.split("/")[-1])


def test_charts_of_tandem_and_vllm_have_data(loaded: RunningCluster, browser: Browser) -> None:
    url = loaded.status()["state"]["grafana_url"]
    span = "from=now-5m&to=now&refresh=5s"
    browser.open(f"{url}/d/tandem-generator?{span}&var-model=smollm2")
    browser.wait_for_panels(["TTFT", "ITL", "vLLM: tokens per second"])
    browser.save("generator")
    browser.open(f"{url}/d/rayServeLlmDashboard?{span}")
    browser.wait_for_panels(["Generation Tokens/s", "TTFT -- P90"])
    browser.save("llm")


def test_rays_panels_have_the_documented_data(
    loaded: RunningCluster, prometheus: Prometheus
) -> None:
    url = loaded.status()["state"]["grafana_url"]
    documented = documented_panels()
    expected = {panel for panel, text in documented.items() if text == "yes"}
    assert panels_with_data(url).keys() == documented.keys()
    prometheus.wait_until(lambda: all(panels_with_data(url)[panel] for panel in expected))
    found = {panel for panel, has_data in panels_with_data(url).items() if has_data}
    assert expected - found == set()
    assert {panel for panel in found if documented[panel].startswith("no")} == set()


def test_all_rules_are_evaluated(prometheus: Prometheus) -> None:
    groups = httpx.get(f"{prometheus.url}/api/v1/rules", timeout=30).json()["data"]["groups"]
    loaded = {rule["name"] for group in groups for rule in group["rules"]}
    for path in monitoring.RULES.glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            assert {rule.get("alert") or rule["record"] for rule in group["rules"]} <= loaded
    assert not [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]


def test_overload_fires_its_alert(loaded: RunningCluster, fast_prometheus: Prometheus) -> None:
    prometheus = fast_prometheus
    assert prometheus.wait_until(lambda: prometheus.is_firing("TandemShedding", model=FLOODED))
    assert not prometheus.is_firing("TandemShedding", model="smollm2")


def test_a_leak_fires_its_alert(loaded: RunningCluster, fast_prometheus: Prometheus) -> None:
    prometheus = fast_prometheus
    assert prometheus.wait_until(lambda: prometheus.is_firing("TandemMemoryGrowing", model=LEAKING))
    assert not prometheus.is_firing("TandemMemoryGrowing", model="smollm2")


def test_a_killed_engine_fires_its_alert(loaded: RunningCluster, prometheus: Prometheus) -> None:
    assert not prometheus.is_firing("TandemEngineDied")
    deployments = loaded.status()["application"]["deployments"]
    victim = next(d for d in deployments if d["name"] == "generator-smollm2")["replicas"][0]
    psutil.Process(victim["pid"]).send_signal(signal.SIGKILL)
    assert prometheus.wait_until(lambda: prometheus.is_firing("TandemEngineDied"))
