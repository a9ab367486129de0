"""A dead engine is noticed, its replica replaced, and nothing hangs or is left behind."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.cluster.conftest import RunningCluster
from tests.cluster.engine_processes import engines_of_cluster

MODEL = "smollm2"


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} took longer than {timeout_s} s"
        time.sleep(0.2)


def test_a_dead_engine_is_replaced(cluster: RunningCluster) -> None:
    with httpx.Client(base_url=cluster.http_url, timeout=180) as http:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
        old = engines_of_cluster(cluster.home)
        assert len(old) == 1

        long = {**body, "max_tokens": 300, "ignore_eos": True}
        with ThreadPoolExecutor(1) as thread:
            under_way = thread.submit(http.post, "/v1/completions", json=long)
            wait_until(
                lambda: http.get("/ready").json()["pools"][MODEL]["running"] == 1, 30, "the start"
            )
            old[0].kill()
            # Nothing of it had been answered: it is given to the next replica, or told so.
            cut_off = under_way.result(timeout=200)
        assert cut_off.status_code in (200, 503), cut_off.text
        assert "Traceback" not in cut_off.text

        # Admitted while no replica runs, it waits for the next one.
        answer = http.post("/v1/completions", json=body)
        deadline = time.monotonic() + 170
        while answer.status_code != 200:
            assert answer.status_code in (429, 503), answer.text
            assert time.monotonic() < deadline
            time.sleep(0.5)
            answer = http.post("/v1/completions", json=body)
        new = engines_of_cluster(cluster.home)
        assert len(new) == 1
        assert new[0].pid != old[0].pid
        wait_until(lambda: http.get("/ready").status_code == 200, 60, "being ready again")


def test_a_replica_that_is_killed_takes_its_engine_with_it(cluster: RunningCluster) -> None:
    (engine,) = engines_of_cluster(cluster.home)
    replica = engine.parent()
    assert replica is not None
    replica.kill()
    wait_until(lambda: not engine.is_running(), 10, "the engine's end")
    with httpx.Client(base_url=cluster.http_url, timeout=180) as http:
        wait_until(lambda: http.get("/ready").status_code == 200, 150, "being ready again")
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
