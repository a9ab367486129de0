"""Rollouts on real vLLM and the default classifier, under a load that never fails."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.models.store import models_dir
from tests.cluster.conftest import RunningCluster, router_config, serve_config, wait_until

pytestmark = pytest.mark.timeout(900)

MODEL, CLASSIFIER = "smollm2", "sentiment"
STREAM = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 6,
    "temperature": 0,
    "stream": True,
}
CLASSIFY = {"model": CLASSIFIER, "input": "I loved it.", "top_k": 1}
PAUSE_S = 0.2
"""Time between the requests of a client, in which new versions start faster."""
# Both versions share two cores with other tests, so their speed says little.
SETTINGS = ["min_requests=20", "step_s=2", "max_slowdown=20", "max_error_increase=0.15"]


def config() -> dict[str, Any]:
    return serve_config(
        generators=[
            {
                "name": MODEL,
                "model": "smollm2-135m-instruct",
                "max_model_len": 512,
                "kv_cache_memory_bytes": "128MiB",
                "resources": {"cpus": 0.5},
            }
        ],
        classifiers=[
            {"name": CLASSIFIER, "model": "sentiment-minilm", "resources": {"cpus": 0.25}}
        ],
        router=router_config(1),
    )


def copy_model(name: str, to: Path, *, without: str = "") -> Path:
    """Copy a default model by links, without one file if wanted."""
    to.mkdir()
    for file in (models_dir() / name).iterdir():
        if file.name != without:
            (to / file.name).symlink_to(file.resolve())
    return to


@contextmanager
def steady_load(url: str) -> Iterator[Counter[str]]:
    """Stream and classify inside the block; yield the growing counts of outcomes."""
    ends: Counter[str] = Counter()
    stop = threading.Event()

    def repeat(path: str, body: dict[str, Any], worker: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            for number in range(10**6):
                if stop.is_set():
                    return
                headers = {"x-session-id": f"{worker}-{number}"}
                try:
                    answer = http.post(path, json=body, headers=headers)
                    is_complete = not body.get("stream") or "data: [DONE]" in answer.text
                    is_ok = answer.status_code == 200 and is_complete
                    ends[
                        "ok" if is_ok else f"{path} {answer.status_code} {answer.text[-300:]}"
                    ] += 1
                except httpx.HTTPError as error:
                    ends[f"{path} {error!r}"] += 1
                time.sleep(PAUSE_S)

    with ThreadPoolExecutor(4) as threads:
        for worker in range(3):
            threads.submit(repeat, "/v1/chat/completions", STREAM, worker)
        threads.submit(repeat, "/classify", CLASSIFY, 3)
        try:
            yield ends
        finally:
            stop.set()


def roll_out(cluster: RunningCluster, model: str, to: Path) -> tuple[int, dict[str, Any]]:
    """Roll out and wait; return the exit status and the final state."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    done = cluster.tandem(
        *("rollout", model, "--to", str(to), "--canary", "50,100", *settings, "--wait"),
        timeout_s=600,
    )
    print(done.stdout, done.stderr)
    shown = cluster.tandem("rollout", "status", model, "--json")
    (state,) = json.loads(shown.stdout)
    return done.returncode, state


def running(cluster: RunningCluster, kind: str) -> dict[str, str]:
    return {
        id: name
        for id, (name, state) in cluster.replicas().items()
        if name.startswith(kind) and state == "RUNNING"
    }


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        (MODEL, "smollm2-135m-instruct", "generator"),
        # Unit tests cover what differs: the comparison of labels.
        pytest.param(CLASSIFIER, "sentiment-minilm", "classifier", marks=pytest.mark.long),
    ],
)
def test_a_good_model_is_promoted_and_no_request_fails(
    sim_cluster: RunningCluster, tmp_path: Path, model: str, name: str, kind: str
) -> None:
    other_kind = "generator" if kind == "classifier" else "classifier"
    others = running(sim_cluster, other_kind)
    good = copy_model(name, tmp_path / "good")
    with steady_load(sim_cluster.http_url) as ends:
        status, state = roll_out(sim_cluster, model, good)
        assert status == 0, state
        assert state["phase"] == "promoted"
        names = {f"{kind}-{model}@{state['version']}"}
        wait_until(
            lambda: set(running(sim_cluster, kind).values()) == names, 150, "the end of the others"
        )
    assert set(ends) == {"ok"}, ends
    assert running(sim_cluster, other_kind) == others, "other pools are not touched"


def test_a_model_that_fails_is_rolled_back_and_no_request_fails(
    sim_cluster: RunningCluster, tmp_path: Path
) -> None:
    """The new version loads, but rejects every chat; the old one answers instead."""
    broken = copy_model("smollm2-135m-instruct", tmp_path / "broken", without="chat_template.jinja")
    before = running(sim_cluster, "generator")
    with steady_load(sim_cluster.http_url) as ends:
        status, state = roll_out(sim_cluster, MODEL, broken)
        assert status == 1
        assert state["phase"] == "rolled_back"
        assert "failed" in state["decisions"][-1]["reason"]
        # The old replicas stay, and nothing else does.
        wait_until(
            lambda: running(sim_cluster, "generator") == before, 150, "the end of the others"
        )
    assert set(ends) == {"ok"}, ends
