"""Greedy streams of two vLLM replicas survive a hung replica, a dead engine and a dead replica."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.cluster.conftest import RunningCluster, router_config, serve_config
from tests.cluster.engine_processes import engines_of_cluster
from tests.cluster.test_recovery import wait_until

MODEL = "smollm2"
PROMPTS = [f"Story {number}: once upon a time" for number in range(8)]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def two_replicas(
    make_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCluster]:
    generator = {
        "name": MODEL,
        "model": "smollm2-135m-instruct",
        "max_model_len": 512,
        # In bfloat16, another batch often changes the numbers enough to change a token.
        "dtype": "float32",
        "kv_cache_memory_bytes": 128 * 1024**2,
        "replicas": {"min": 2, "max": 2},
        "resources": {"cpus": 0.4},
        "routing": "least-load",
    }
    file = tmp_path_factory.mktemp("handover") / "config.yaml"
    config = serve_config(generators=[generator], router=router_config(1))
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    # Threads of two engines that wait for each other on the same cores slow both down.
    running: RunningCluster = make_cluster(
        "--config", str(file), VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1"
    )
    yield running
    running.down()


class Stream:
    """A greedy completion that is read in a thread."""

    def __init__(self, http: httpx.Client, prompt: str) -> None:
        self._http = http
        self._prompt = prompt
        self.raw = ""

    def read(self) -> None:
        body = {"model": MODEL, "prompt": self._prompt, "max_tokens": 100, "temperature": 0}
        fields = {"stream": True, "ignore_eos": True, **body}
        with self._http.stream("POST", "/v1/completions", json=fields) as response:
            for piece in response.iter_text():
                self.raw += piece

    def text(self) -> str:
        """Return the text of a complete stream, all of whose events have one id."""
        assert self.raw.endswith("data: [DONE]\n\n"), self.raw[-300:]
        lines = [line for line in self.raw.splitlines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert len({(event["id"], event["created"]) for event in events}) == 1
        return "".join(event["choices"][0]["text"] for event in events)


def run_streams(url: str, disturb: Callable[[], None] | None = None) -> list[str]:
    """Return the texts of all streams; call ``disturb`` while they run."""
    with (
        httpx.Client(base_url=url, timeout=120) as http,
        ThreadPoolExecutor(len(PROMPTS)) as threads,
    ):
        streams = [Stream(http, prompt) for prompt in PROMPTS]
        reading = [threads.submit(stream.read) for stream in streams]
        if disturb is not None:
            wait_until(lambda: all(each.raw.count("data:") > 3 for each in streams), 60, "starting")
            disturb()
            assert not any(each.done() for each in reading)
        for each in reading:
            each.result(timeout=120)
    return [stream.text() for stream in streams]


@pytest.fixture(scope="module")
def undisturbed(two_replicas: RunningCluster) -> list[str]:
    return run_streams(two_replicas.http_url)


def replica_of(engine: psutil.Process) -> psutil.Process:
    replica = engine.parent()
    assert replica is not None
    return replica


def stop_replica(engine: psutil.Process) -> None:
    os.kill(replica_of(engine).pid, signal.SIGSTOP)


def kill_engine(engine: psutil.Process) -> None:
    engine.kill()


def kill_replica(engine: psutil.Process) -> None:
    replica_of(engine).kill()


@pytest.mark.parametrize("fault", [stop_replica, kill_engine, kill_replica])
def test_all_greedy_streams_are_identical(
    two_replicas: RunningCluster,
    undisturbed: list[str],
    fault: Callable[[psutil.Process], None],
) -> None:
    with httpx.Client(base_url=two_replicas.http_url, timeout=60) as http:
        wait_until(lambda: http.get("/ready").json()["pools"][MODEL]["ready"] == 2, 200, "start")
    engine = engines_of_cluster(two_replicas.home)[0]
    replica = replica_of(engine)
    try:
        assert run_streams(two_replicas.http_url, lambda: fault(engine)) == undisturbed
    finally:
        if replica.is_running() and replica.status() == psutil.STATUS_STOPPED:
            replica.resume()
    if fault is stop_replica:  # it goes on, and finds nobody to write to
        assert run_streams(two_replicas.http_url) == undisturbed
