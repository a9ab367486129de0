"""Replicas that leak memory are drained and replaced one at a time; one that hangs is replaced."""

import httpx

from tests.cluster.conftest import RunningCluster, wait_until
from tests.cluster.streams import complete_streams, until


def running_generators(cluster: RunningCluster) -> set[str]:
    return {
        id_
        for id_, (name, state) in cluster.replicas().items()
        if name == "generator-leaking" and state == "RUNNING"
    }


async def test_leaking_replicas_are_replaced_one_at_a_time(sims: RunningCluster) -> None:
    """Wait for two replacements; the second may concern the replica that the first one started."""
    wait_until(lambda: len(running_generators(sims)) == 2, 60, "listing the replicas")
    seen = running_generators(sims)
    min_ready = 2
    with httpx.Client(base_url=sims.http_url, timeout=60) as http:

        def two_replaced() -> bool:
            nonlocal min_ready
            min_ready = min(min_ready, http.get("/ready").json()["pools"]["leaking"]["ready"])
            running = running_generators(sims)
            seen.update(running)
            return len(seen - running) >= 2

        async with complete_streams(sims.http_url, streams=4, model="leaking"):
            await until(two_replaced, 240, "replacing two replicas")
    assert min_ready >= 1  # one replica always serves


def test_all_replicas_run_after_the_replacement(sims: RunningCluster) -> None:
    wait_until(sims.all_run, 120, "the end of the last replacement")


def test_a_hung_replica_is_replaced(sims: RunningCluster) -> None:
    body = {"model": "org/hanging", "prompt": "a", "max_tokens": 3}
    with httpx.Client(base_url=sims.http_url, timeout=100) as http:
        for _ in range(3):
            assert http.post("/v1/completions", json=body).status_code == 200
        hung = http.post("/v1/completions", json=body)
        # Nothing was sent, so it is retried on the new replica if that starts in time.
        assert hung.status_code == 200 or hung.json()["error"]["type"] == "ServiceUnavailableError"

        def is_served() -> bool:
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code in (200, 429, 503), answer.text
            return answer.status_code == 200

        wait_until(is_served, 180, "replacing the replica")
