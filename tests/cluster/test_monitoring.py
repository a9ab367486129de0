"""`tandem up --monitoring`: all metrics reach Prometheus, all panels have data, alerts fire."""

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from tests.cluster.conftest import (
    RunningCluster,
    router_config,
    serve_config,
    sim_generator,
    wait_until,
)
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
TIMEOUT_S = 180.0
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
    "tandem_audio_": "a speech model (tests/cluster/test_speech.py)",
    "tandem_media_": "a vision model (tests/cluster/test_vllm_images.py)",
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

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = self._http.get("/api/v1/query", params={"query": expr})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def metric_names(self) -> set[str]:
        return set(self._http.get("/api/v1/label/__name__/values").json()["data"])

    def rules(self) -> list[dict[str, Any]]:
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def is_firing(self, alert: str, **labels: str) -> bool:
        wanted = {"alertname": alert, "alertstate": "firing", **labels}
        matchers = ",".join(f'{name}="{value}"' for name, value in wanted.items())
        return bool(self.query(f"ALERTS{{{matchers}}}"))


@pytest.fixture(scope="module")
def started(make_cluster: Any) -> Iterator[RunningCluster]:
    running: RunningCluster = make_cluster("--monitoring", config=config())
    yield running
    running.down()
    assert not any(p.info["name"] == "prometheus" and belongs_to(p, running) for p in processes())


@pytest.fixture(scope="module")
def fast_prometheus(
    started: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Start a second Prometheus for the cluster, with shorter durations in its rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    for path in monitoring.RULES.glob("*.yml"):
        (folder / path.name).write_text(speed_up(path.read_text(), SPEED_UP))
    targets = monitoring.Targets(started.dashboard_url, None)
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
    with (
        subprocess.Popen(command) as process,
        httpx.Client(base_url=f"http://{address}", timeout=60) as http,
    ):
        yield Prometheus(http)
        process.terminate()


@pytest.fixture(scope="module")
def overloaded(started: RunningCluster, fast_prometheus: Prometheus) -> Iterator[RunningCluster]:
    """Send more requests than one pool can serve, and some to the leaking one, until the end."""
    clients = [(FLOODED, 0.2)] * 20 + [(LEAKING, 0.25)]
    with repeated(*(partial(send_repeatedly, started.http_url, *client) for client in clients)):
        yield started


@contextlib.contextmanager
def repeated(*clients: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run clients in threads inside the block; which the event tells to end."""
    done = threading.Event()
    with ThreadPoolExecutor(len(clients)) as pool:
        running = [pool.submit(client, done) for client in clients]
        try:
            yield
        finally:
            done.set()
    for client in running:
        client.result()


def send_repeatedly(url: str, model: str, pause_s: float, done: threading.Event) -> None:
    """Send one request after another, whatever its status, with a pause in between."""
    body = {"model": model, "prompt": "a b c", "max_tokens": 16}
    with httpx.Client(base_url=url, timeout=120) as client:
        while not done.wait(pause_s):
            client.post("/v1/completions", json=body)


def send_mixed_load(url: str, done: threading.Event) -> None:
    """Send chats, streamed and whole, and texts to classify, one after another."""
    chat = {"model": "smollm2", "max_tokens": 16, "messages": [{"role": "user", "content": "Hi"}]}
    # Longer than one block of the KV cache, so that the prefix cache has hits.
    long = {"model": "real", "max_tokens": 16, "prompt": "one two three four " * 60}
    with httpx.Client(base_url=url, timeout=120) as client:
        while not done.is_set():
            client.post("/v1/chat/completions", json={**chat, "stream": True})
            client.post("/v1/chat/completions", json=chat)
            client.post("/v1/completions", json=long)
            texts = ["good", "bad", f"the film of {time.monotonic()}"]
            client.post("/classify", json={"input": texts})


@pytest.fixture
def mixed_load(overloaded: RunningCluster) -> Iterator[None]:
    with repeated(partial(send_mixed_load, overloaded.http_url)):
        yield


def processes() -> list[psutil.Process]:
    return list(psutil.process_iter(["name"]))


def belongs_to(process: psutil.Process, running: RunningCluster) -> bool:
    try:
        return process.environ().get("TANDEM_HOME") == str(running.home)
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def prometheus(overloaded: RunningCluster) -> Iterator[Prometheus]:
    url = overloaded.status()["state"]["prometheus_url"]
    with httpx.Client(base_url=url, timeout=60) as http:
        yield Prometheus(http)


def series(metric: Metric) -> str:
    return f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name


def test_every_target_is_up(prometheus: Prometheus) -> None:
    def jobs_up() -> set[str]:
        return {found["metric"]["job"] for found in prometheus.query("up == 1")}

    wait_until(lambda: jobs_up() == {"ray", "ingress"}, TIMEOUT_S, "the first scrapes")
    wait_until(lambda: not prometheus.query("up == 0"), TIMEOUT_S, "the first scrapes")


@pytest.mark.usefixtures("mixed_load")
def test_every_metric_reaches_prometheus(prometheus: Prometheus) -> None:
    missing = {series(metric) for metric in table.all_metrics() if metric.name not in ABSENT}

    def is_complete() -> bool:
        missing.difference_update(prometheus.metric_names())
        return not missing

    with contextlib.suppress(AssertionError):
        wait_until(is_complete, TIMEOUT_S, "the metrics")
    assert sorted(missing) == []


@pytest.mark.usefixtures("mixed_load")
def test_every_panel_has_data(prometheus: Prometheus) -> None:
    empty = [
        (path.stem, panel["title"], target["expr"])
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
        if not any(name in target["expr"] for name in (*ABSENT, "ray_vllm_num_preemptions_"))
    ]

    def have_data() -> bool:
        empty[:] = [panel for panel in empty if not prometheus.query(as_shown(panel[-1]))]
        return not empty

    with contextlib.suppress(AssertionError):
        wait_until(have_data, TIMEOUT_S, "the panels")
    assert empty == []


def as_shown(expr: str) -> str:
    """Return a panel's query as Grafana sends it."""
    query = expr.replace("$__rate_interval", "5m").replace("$model", ".+")
    return query.replace("$tenant", ".*")


def test_startup_phases_add_up(prometheus: Prometheus) -> None:
    def took(*phases: str) -> float:
        query = f'tandem_startup_seconds{{model="{FLOODED}",phase=~"{"|".join(phases)}"}}'
        found = {one["metric"]["phase"]: float(one["value"][1]) for one in prometheus.query(query)}
        return sum(found.values()) if found.keys() == set(phases) else float("nan")

    sums = {
        "decision": ("scheduling", "start", "notice"),
        "start": ("process", "replica"),
        "replica": ("imports", "model", "link"),
    }

    def are_equal() -> bool:  # once all of one start were scraped
        return all(took(*parts) == pytest.approx(took(whole)) for whole, parts in sums.items())

    wait_until(are_equal, TIMEOUT_S, "the phases")
    assert took("decision") > 0


def test_rays_dashboard_finds_prometheus(overloaded: RunningCluster) -> None:
    url = f"{overloaded.dashboard_url}/api/prometheus_health"
    wait_until(
        lambda: httpx.get(url, timeout=30).status_code == 200,
        60,
        "finding Prometheus",
        ignored=(httpx.HTTPError,),
    )


@pytest.fixture(scope="module")
def browser(
    overloaded: RunningCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    url = overloaded.dashboard_url
    opened = Browser(url, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.driver.quit()


@pytest.mark.timeout(900)
def test_rays_dashboard_shows_charts(overloaded: RunningCluster, browser: Browser) -> None:
    replica = next(
        r for r, (name, _) in overloaded.replicas().items() if name == "generator-smollm2"
    )
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
        browser.show_frames(address, frames)
        browser.save(address.split("/")[-1])


def test_charts_of_tandem_and_vllm_have_data(overloaded: RunningCluster, browser: Browser) -> None:
    url = overloaded.status()["state"]["grafana_url"]
    span = "from=now-5m&to=now&refresh=5s"
    browser.open(f"{url}/d/tandem-generator?{span}&var-model=smollm2")
    browser.wait_for_panels(["TTFT", "ITL", "vLLM: tokens per second"])
    browser.save("generator")
    browser.open(f"{url}/d/rayServeLlmDashboard?{span}")
    browser.wait_for_panels(["Generation Tokens/s", "TTFT -- P90"])
    browser.save("llm")


def test_rays_panels_have_the_documented_data(overloaded: RunningCluster) -> None:
    url = overloaded.status()["state"]["grafana_url"]
    documented = documented_panels()
    expected = {panel for panel, text in documented.items() if text == "yes"}
    assert panels_with_data(url).keys() == documented.keys()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: all(map(panels_with_data(url).get, expected)), TIMEOUT_S, "the panels")
    found = {panel for panel, has_data in panels_with_data(url).items() if has_data}
    assert expected - found == set()
    assert {panel for panel in found if documented[panel].startswith("no")} == set()


def test_all_rules_are_evaluated(prometheus: Prometheus) -> None:
    def health() -> set[str]:
        return {rule["health"] for rule in prometheus.rules()}

    wait_until(lambda: "unknown" not in health(), TIMEOUT_S, "the first evaluation")
    loaded = {rule["name"] for rule in prometheus.rules()}
    for path in monitoring.RULES.glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            assert {rule.get("alert") or rule["record"] for rule in group["rules"]} <= loaded
    assert not [rule for rule in prometheus.rules() if rule["health"] == "err"]


@pytest.mark.usefixtures("overloaded")
def test_overload_fires_its_alert(fast_prometheus: Prometheus) -> None:
    wait_for_alert(fast_prometheus, "TandemShedding", model=FLOODED)
    assert not fast_prometheus.is_firing("TandemShedding", model="smollm2")


@pytest.mark.usefixtures("overloaded")
def test_a_leak_fires_its_alert(fast_prometheus: Prometheus) -> None:
    wait_for_alert(fast_prometheus, "TandemMemoryGrowing", model=LEAKING)
    assert not fast_prometheus.is_firing("TandemMemoryGrowing", model="smollm2")


def test_a_killed_engine_fires_its_alert(
    overloaded: RunningCluster, prometheus: Prometheus
) -> None:
    assert not prometheus.is_firing("TandemEngineDied")
    (victim,) = overloaded.deployments()["generator-smollm2"]
    psutil.Process(victim["pid"]).send_signal(signal.SIGKILL)
    wait_for_alert(prometheus, "TandemEngineDied")


def wait_for_alert(prometheus: Prometheus, alert: str, **labels: str) -> None:
    wait_until(lambda: prometheus.is_firing(alert, **labels), TIMEOUT_S, alert)
