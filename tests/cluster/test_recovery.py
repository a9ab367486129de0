"""Recovery from a killed engine and a killed replica, without hanging requests or processes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest

from tests.cluster.batch_runs import submit
from tests.cluster.conftest import RunningCluster, wait_until, wait_until_ready
from tests.cluster.engine_processes import engines_of_cluster, has_ended

MODEL = "smollm2"
MAX_TOKENS = 300
"""Tokens of an answer whose engine dies long before its end."""
LINE_TOKENS = 60
"""Tokens of an answer to a line of a batch."""

pytestmark = pytest.mark.timeout(900)


def read_chat(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield from client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count."}],
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )


def read_responses(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield from client.responses.create(
            model=MODEL,
            input="Count.",
            max_output_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )


def read_messages(url: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield from client.messages.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count."}],
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )


STREAMS: dict[str, Callable[[str], Iterator[Any]]] = {
    "openai chat": read_chat,
    "openai responses": read_responses,
    "anthropic": read_messages,
}


def read_stream(name: str, url: str, has_begun: Barrier) -> Exception | None:
    """Return the error that ends a stream; None if it ends without one."""
    try:
        stream = STREAMS[name](url)
        for _ in range(4):
            next(stream)
        has_begun.wait(timeout=120)
        for _ in stream:
            pass
    except Exception as error:
        return error
    return None


def assert_no_replica_became_ready(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert "no replica became ready in time" in response.json()["error"]["message"]


def test_a_dead_engine_is_replaced(cluster: RunningCluster) -> None:
    with httpx.Client(base_url=cluster.http_url, timeout=180) as http:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).status_code == 200
        old = engines_of_cluster(cluster.home)
        assert len(old) == 1

        long = {**body, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        with ThreadPoolExecutor(1 + len(STREAMS)) as thread:
            barrier = Barrier(1 + len(STREAMS))
            streams = [
                thread.submit(read_stream, name, cluster.http_url, barrier) for name in STREAMS
            ]
            barrier.wait(timeout=120)
            old[0].suspend()  # no answer may end before the engine is killed
            in_flight = thread.submit(http.post, "/v1/completions", json=long)

            def all_in_flight() -> bool:
                unfinished = 1 + sum(not each.done() for each in streams)
                return bool(http.get("/ready").json()["pools"][MODEL]["in_flight"] == unfinished)

            wait_until(all_in_flight, 60, "starting the requests")
            old[0].kill()
            # The streams go on at the new replica, or end with an error if that is not ready within
            # `queue_timeout_s`.
            for stream in streams:
                error = stream.result(timeout=200)
                if error is not None:
                    assert isinstance(error, openai.APIError | anthropic.APIStatusError), error
                    assert "try again" in str(error), error
                    assert "EngineCore" not in str(error)
            # No byte had been sent, so the request fails over to the new replica, or gets 503
            # if that is not ready within `queue_timeout_s`.
            interrupted = in_flight.result(timeout=200)
        if interrupted.status_code == 200:
            assert interrupted.json()["usage"]["completion_tokens"] == MAX_TOKENS
        else:
            assert_no_replica_became_ready(interrupted)
        assert "Traceback" not in interrupted.text

        wait_until_answered(http, body)
        new = engines_of_cluster(cluster.home)
        assert len(new) == 1
        assert new[0].pid != old[0].pid
        wait_until_ready(http)


def wait_until_answered(http: httpx.Client, body: dict[str, Any]) -> None:
    """Repeat a request, which waits for the new replica, but at most for `queue_timeout_s`."""

    def is_answered() -> bool:
        response = http.post("/v1/completions", json=body)
        if response.status_code not in (200, 429):
            assert_no_replica_became_ready(response)
        return response.status_code == 200

    wait_until(is_answered, 240, "starting the new replica")


def router_process(cluster: RunningCluster) -> psutil.Process:
    """Return the process of the cluster's router."""
    (router,) = cluster.deployments()["router"]
    return psutil.Process(router["pid"])


def test_a_batch_continues_after_its_router_was_killed(cluster: RunningCluster) -> None:
    with httpx.Client(base_url=cluster.http_url, timeout=60) as http:
        wait_until_ready(http)
        batch = submit(http, cluster.http_url, 12 * [MODEL], LINE_TOKENS)
        router = router_process(cluster)
        batch.wait_for_lines(cluster.http_url)
        router.kill()
        batch.check_results(cluster.http_url, LINE_TOKENS)


def test_a_killed_replica_takes_its_engine_with_it(cluster: RunningCluster) -> None:
    """A batch goes on at the new replica."""
    (engine,) = engines_of_cluster(cluster.home)
    replica = engine.parent()
    assert replica is not None
    with httpx.Client(base_url=cluster.http_url, timeout=180) as http:
        wait_until_ready(http)
        batch = submit(http, cluster.http_url, 12 * [MODEL], LINE_TOKENS)
        batch.wait_for_lines(cluster.http_url)
        replica.kill()
        wait_until(lambda: has_ended(engine), 60, "the end of the engine")
        wait_until_answered(http, {"model": MODEL, "prompt": "a", "max_tokens": 4})
        batch.check_results(cluster.http_url, LINE_TOKENS)
        wait_until_ready(http)
