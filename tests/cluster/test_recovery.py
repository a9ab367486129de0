"""Recovery from a killed engine and a killed replica, without hanging requests or processes."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.cluster.conftest import RunningCluster
from tests.cluster.engine_processes import engines_of_cluster

MODEL = "smollm2"


def wait_until(condition: Callable[[], bool], timeout_s: float, event: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{event} took longer than {timeout_s} s"
        time.sleep(0.2)


def test_a_dead_engine_is_replaced(cluster: RunningCluster) -> None:
    with httpx.Client(base_url=cluster.http_url, timeout=180) as http:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
        old = engines_of_cluster(cluster.home)
        assert len(old) == 1

        long = {**body, "max_tokens": 300, "ignore_eos": True}
        with ThreadPoolExecutor(1) as thread:
            in_flight = thread.submit(http.post, "/v1/completions", json=long)
            wait_until(
                lambda: http.get("/ready").json()["pools"][MODEL]["running"] == 1,
                30,
                "starting the request",
            )
            old[0].kill()
            # No byte had been sent, so the request fails over to the new replica, or gets 503
            # if no replica is left to wait for.
            interrupted = in_flight.result(timeout=200)
        if interrupted.status_code == 200:
            assert interrupted.json()["usage"]["completion_tokens"] == 300
        else:
            assert interrupted.status_code == 503, interrupted.text
            assert interrupted.json()["error"]["message"]
        assert "Traceback" not in interrupted.text

        # Requests are queued for the new replica, or shed, until it is ready.
        response = http.post("/v1/completions", json=body)
        deadline = time.monotonic() + 170
        while response.status_code != 200:
            assert response.status_code in (429, 503), response.text
            assert time.monotonic() < deadline
            time.sleep(0.5)
            response = http.post("/v1/completions", json=body)
        new = engines_of_cluster(cluster.home)
        assert len(new) == 1
        assert new[0].pid != old[0].pid
        wait_until(lambda: http.get("/ready").status_code == 200, 60, "becoming ready again")


def test_a_killed_replica_takes_its_engine_with_it(cluster: RunningCluster) -> None:
    (engine,) = engines_of_cluster(cluster.home)
    replica = engine.parent()
    assert replica is not None
    replica.kill()
    wait_until(lambda: not engine.is_running(), 10, "the end of the engine")
    with httpx.Client(base_url=cluster.http_url, timeout=180) as http:
        wait_until(lambda: http.get("/ready").status_code == 200, 150, "becoming ready again")
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
