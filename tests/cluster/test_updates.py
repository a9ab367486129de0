"""Updates of the default deployment while vLLM streams, and a hang of the updated engine.

Last of the modules that share the cluster, because of the short ``stall_timeout_s``.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest
import yaml

from cluster.launch import processes
from tests.cluster.conftest import (
    ALIASES,
    CLASSIFIER_ALIASES,
    GUARDS,
    ROOT,
    RunningCluster,
    wait_until,
    wait_until_ready,
)
from tests.cluster.engine_processes import engines_of_cluster, has_ended
from tests.cluster.test_recovery import (
    MODEL,
    STREAMS,
    assert_no_replica_became_ready,
    read_stream,
)

pytestmark = pytest.mark.timeout(600)

TOKENS = 300
STALL_TIMEOUT_S = 10


def changed_config(**sections: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of ``cluster`` with other fields of its sections."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "ray-config.yaml").read_text("utf-8"))
    args = config["applications"][0]["args"]
    args |= {"guards": GUARDS, "applications": {}}
    args["generators"][0] |= {"aliases": ALIASES, **sections.pop("generators", {})}
    args["classifiers"][0] |= {"aliases": CLASSIFIER_ALIASES, **sections.pop("classifiers", {})}
    for name, fields in sections.items():
        args[name] = {**args.get(name, {}), **fields}
    return config


def update_config(router_cpus: float = 0.21) -> dict[str, Any]:
    """Return a configuration that replaces the replicas of vLLM and the routers."""
    generator = {"stall_timeout_s": STALL_TIMEOUT_S, "engine_args": {"max_num_seqs": 128}}
    return changed_config(generators=generator, router={"resources": {"cpus": router_cpus}})


def num_streamed(http: httpx.Client, has_begun: threading.Event) -> int:
    """Return the tokens of a complete stream."""
    body = {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events = []
    with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            has_begun.set()
            events += [line.removeprefix("data: ")] if line else []
    assert events[-1] == "[DONE]", events[-1]
    return int(json.loads(events[-2])["usage"]["completion_tokens"])


def stream_until(
    is_updated: threading.Event, cluster: RunningCluster, has_begun: threading.Event
) -> list[int]:
    """Stream one answer after the other; return the numbers of their tokens."""
    streamed = []
    with httpx.Client(base_url=cluster.http_url, timeout=120) as http:
        while not is_updated.is_set():
            streamed.append(num_streamed(http, has_begun))
    return streamed


def test_live_changes_replace_no_replica_and_interrupt_no_request(cluster: RunningCluster) -> None:
    has_begun, is_updated = threading.Event(), threading.Event()
    classification = {"model": "sentiment", "input": ["good", "bad", "so so"]}

    def classify_until_updated() -> set[int]:
        """Return the statuses of requests over a new connection each."""
        statuses = set()
        while not is_updated.is_set():
            answer = httpx.post(f"{cluster.http_url}/classify", json=classification, timeout=60)
            statuses.add(answer.status_code)
        return statuses

    def status(model: str, filler: int = 0) -> int:
        body = {"model": model, "prompt": "a", "max_tokens": 1, "user": "x" * filler}
        return httpx.post(f"{cluster.http_url}/v1/completions", json=body, timeout=60).status_code

    def is_applied() -> bool:
        return (status("renamed"), status(MODEL, 5000)) == (200, 413)

    wait_until(cluster.all_run, 120, "the end of earlier replacements")
    before, engines = cluster.replicas(), [each.pid for each in engines_of_cluster(cluster.home)]
    generator = {
        "aliases": [*ALIASES, "renamed"],
        "max_in_flight": 64,
        "routing": "least-load",
        "slo": {"ttft_p90_s": 5},
        "stall_timeout_s": 300,
    }
    changes = {
        "generators": generator,
        "classifiers": {"max_texts": 500, "priority": 1},
        "router": {"max_body_bytes": 4096, "max_queued": 512, "client_timeout_s": 59},
        "accounting": {"per_cpu_hour": 1.0},
    }
    with ThreadPoolExecutor(2) as threads:
        streaming = threads.submit(stream_until, is_updated, cluster, has_begun)
        classifying = threads.submit(classify_until_updated)
        assert has_begun.wait(120)
        try:
            cluster.deploy(changed_config(**changes))
            wait_until(is_applied, 120, "the change")
            cluster.deploy(changed_config())
            wait_until(lambda: status("renamed") == 404, 120, "the change back")
        finally:
            is_updated.set()
        assert set(streaming.result(timeout=240)) == {TOKENS}
        assert classifying.result(timeout=60) == {200}
    # A replica that applies a change is not RUNNING for a moment.
    wait_until(lambda: cluster.replicas() == before, 60, "listing the same replicas")
    assert [each.pid for each in engines_of_cluster(cluster.home)] == engines


def test_an_update_of_vllm_interrupts_no_stream(cluster: RunningCluster) -> None:
    has_begun, is_updated = threading.Event(), threading.Event()

    def has_new_replicas() -> bool:
        return not before & {
            id_ for id_, (_, state) in cluster.replicas().items() if state == "RUNNING"
        }

    def only_new_replicas() -> bool:
        return not before & cluster.replicas().keys()

    with ThreadPoolExecutor(1) as thread:
        streaming = thread.submit(stream_until, is_updated, cluster, has_begun)
        assert has_begun.wait(120)
        before = {
            id_
            for id_, (name, _) in cluster.replicas().items()
            if name.startswith(("generator", "router"))
        }
        try:
            cluster.deploy(update_config())
            wait_until(has_new_replicas, 240, "the update")
        finally:
            is_updated.set()
        assert set(streaming.result(timeout=240)) == {TOKENS}
    wait_until(only_new_replicas, 120, "the end of the old replicas")
    wait_until(cluster.all_run, 120, "the end of the update")


def test_new_routers_need_no_new_haproxy(cluster: RunningCluster, http: httpx.Client) -> None:
    def haproxies() -> set[int]:
        return {each.process.pid for each in processes.find(cluster.home) if each.name == "haproxy"}

    def routers() -> dict[str, str]:
        found = cluster.replicas().items()
        return {id_: state for id_, (name, state) in found if name == "router"}

    def are_replaced() -> bool:
        found = routers()
        return not old_routers & found.keys() and set(found.values()) == {"RUNNING"}

    old_routers, old_haproxies = routers().keys(), haproxies()
    cluster.deploy(update_config(router_cpus=0.22))
    wait_until(are_replaced, 120, "the update")
    wait_until_ready(http)
    new_haproxies = haproxies()
    assert new_haproxies
    assert new_haproxies <= old_haproxies  # one that an earlier update replaced may end


def test_a_stopped_engine_is_replaced(cluster: RunningCluster) -> None:
    (engine,) = engines_of_cluster(cluster.home)
    has_begun = threading.Barrier(1 + len(STREAMS))
    with (
        httpx.Client(base_url=cluster.http_url, timeout=180) as http,
        ThreadPoolExecutor(1 + len(STREAMS)) as threads,
    ):
        streams = [
            threads.submit(read_stream, name, cluster.http_url, has_begun) for name in STREAMS
        ]
        has_begun.wait(timeout=120)
        engine.suspend()
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        waiting = threads.submit(http.post, "/v1/completions", json=body)
        for stream in streams:  # they go on at the new replica if that starts in time
            error = stream.result(timeout=STALL_TIMEOUT_S + 200)
            if error is not None:
                assert isinstance(error, openai.APIError | anthropic.APIStatusError), error
                assert "try again" in str(error), error
        answer = waiting.result(timeout=180)  # retried on the new replica if that starts in time
        if answer.status_code != 200:
            assert_no_replica_became_ready(answer)
        wait_until_ready(http)
        assert http.post("/v1/completions", json=body).status_code == 200
    wait_until(lambda: has_ended(engine), 60, "the end of the stopped engine")
    assert len(engines_of_cluster(cluster.home)) == 1
