"""Replicas that leak memory are drained and replaced one at a time; one that hangs is replaced."""

import time
from typing import Any

import httpx

from tests.cluster.conftest import RunningCluster, router_config, serve_config, sim_generator
from tests.cluster.test_scale import complete_streams, until

LEAKS = {
    "sample_s": 0.5,
    "window_s": 10,
    "settle_s": 0,
    "min_bytes_per_s": 65536,
    "min_growth_bytes": "4MiB",
    "replace": True,
    "pause_s": 15,
}


def config() -> dict[str, Any]:
    sim = sim_generator(
        sim={"decode_s_per_token": 0.02, "leak_bytes_per_request": "1MiB"},
        replicas={"min": 2, "max": 2},
    )
    hanging = sim_generator(name="org/hanging", sim={"hang_after_requests": 3}, stall_timeout_s=2)
    return serve_config(generators=[sim, hanging], router=router_config(1), leaks=LEAKS)


def running_generators(cluster: RunningCluster) -> set[str]:
    return {
        id_
        for id_, (name, state) in cluster.replicas().items()
        if name == "generator-sim" and state == "RUNNING"
    }


def states(cluster: RunningCluster) -> list[str]:
    return [state for _, state in cluster.replicas().values()]


async def test_leaking_replicas_are_replaced_one_at_a_time(sim_cluster: RunningCluster) -> None:
    """Wait for two replacements; the second may concern the replica that the first one started."""
    seen = running_generators(sim_cluster)
    assert len(seen) == 2
    min_ready = 2
    with httpx.Client(base_url=sim_cluster.http_url, timeout=60) as http:

        def two_replaced() -> bool:
            nonlocal min_ready
            min_ready = min(min_ready, http.get("/ready").json()["pools"]["sim"]["ready"])
            running = running_generators(sim_cluster)
            seen.update(running)
            return len(seen - running) >= 2

        async with complete_streams(sim_cluster.http_url, streams=4):
            await until(two_replaced, 240, "replacing two replicas")
    assert min_ready >= 1  # one replica always serves


def test_all_replicas_run_after_the_replacement(sim_cluster: RunningCluster) -> None:
    deadline = time.monotonic() + 120
    while set(states(sim_cluster)) != {"RUNNING"}:  # the last one may still be stopping
        assert time.monotonic() < deadline, states(sim_cluster)
        time.sleep(0.5)


def test_a_hung_replica_is_replaced(sim_cluster: RunningCluster) -> None:
    body = {"model": "org/hanging", "prompt": "a", "max_tokens": 3}
    with httpx.Client(base_url=sim_cluster.http_url, timeout=100) as http:
        for _ in range(3):
            assert http.post("/v1/completions", json=body).status_code == 200
        hung = http.post("/v1/completions", json=body)
        # Nothing was sent, so it is retried on the new replica if that starts in time.
        assert hung.status_code == 200 or hung.json()["error"]["type"] == "ServiceUnavailableError"
        deadline = time.monotonic() + 60
        while (answer := http.post("/v1/completions", json=body)).status_code != 200:
            assert answer.status_code in (429, 503), answer.text
            assert time.monotonic() < deadline
            time.sleep(0.5)
