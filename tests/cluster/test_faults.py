"""Clients of the default deployment that disconnect or are too slow, and its logs."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import requests

from cluster.config import RouterConfig
from cluster.launch.log_files import log_directory
from tests.cluster.conftest import RunningCluster, wait_until

MODEL = "smollm2"
MAX_TOKENS = 1900
"""Tokens of an answer that takes far longer than any client here waits for it."""
IDLE_S = 1.0
"""Time after which the engine must have dropped the requests of disconnected clients."""
ATTEMPTS = 4
"""Attempts, of which one must take ``IDLE_S`` at most: a machine may stall for a while."""


def is_idle(http: httpx.Client) -> bool:
    pool = http.get("/ready").json()["pools"][MODEL]
    return not (pool["running"] or pool["in_flight"] or pool["queued"])


def assert_dropped_in_time(http: httpx.Client, abandon: Callable[[], object]) -> None:
    """Abandon requests and wait until the engine has dropped them."""
    took_s = []
    for _ in range(ATTEMPTS):
        abandon()
        began = time.monotonic()
        wait_until(lambda: is_idle(http), 60, "dropping the requests")
        took_s.append(time.monotonic() - began)
        if took_s[-1] < IDLE_S:
            return
    pytest.fail(f"dropping the requests took {took_s} s")


# -- clients that disconnect ------------------------------------------------------------------


def completion(*, stream: bool) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": "Once upon a time",
        "max_tokens": MAX_TOKENS,
        "stream": stream,
        "ignore_eos": True,
    }


def read_until(chunks: Iterator[Any], deadline: float) -> None:
    for _ in chunks:
        if time.monotonic() > deadline:
            return
    raise AssertionError("the answer ended before the client left")


def abandon_with_openai(url: str, after_s: float, *, stream: bool) -> None:
    deadline = time.monotonic() + after_s
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=after_s
    ) as client:
        answer = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=MAX_TOKENS,
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        assert isinstance(answer, openai.Stream)
        with answer:
            read_until(iter(answer), deadline)


def abandon_with_anthropic(url: str, after_s: float, *, stream: bool) -> None:
    deadline = time.monotonic() + after_s
    with anthropic.Anthropic(
        base_url=url, api_key="none", max_retries=0, timeout=after_s
    ) as client:
        answer = client.messages.create(
            model=MODEL,
            # A greedy answer to this takes far longer; this API has no `ignore_eos`.
            messages=[{"role": "user", "content": "Write a long story about a fox."}],
            max_tokens=MAX_TOKENS,
            stream=stream,
            extra_body={"temperature": 0},
        )
        assert isinstance(answer, anthropic.Stream)
        with answer:
            read_until(iter(answer), deadline)


def abandon_with_httpx(url: str, after_s: float, *, stream: bool) -> None:
    deadline = time.monotonic() + after_s
    body = completion(stream=stream)
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=after_s) as answer:
        read_until(answer.iter_raw(), deadline)


def abandon_with_requests(url: str, after_s: float, *, stream: bool) -> None:
    deadline = time.monotonic() + after_s
    body = completion(stream=stream)
    with requests.post(f"{url}/v1/completions", json=body, timeout=after_s, stream=True) as answer:
        read_until(answer.iter_content(None), deadline)


ABANDON = {
    "openai": abandon_with_openai,
    "anthropic": abandon_with_anthropic,
    "httpx": abandon_with_httpx,
    "requests": abandon_with_requests,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ABANDON)
def test_the_engine_drops_the_requests_of_clients_that_disconnect(
    name: str, stream: bool, cluster: RunningCluster, http: httpx.Client
) -> None:
    def abandon(after_s: float) -> None:
        try:
            ABANDON[name](cluster.http_url, after_s, stream=stream)
        except Exception as error:  # each client has several types of errors
            if "timed out" not in str(error).lower():
                raise

    def abandon_all() -> None:
        # The first ones leave before the first byte of any answer, the last ones in mid-stream.
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(abandon, [0.01, 0.02, 0.05, 0.2, 0.4, 0.5, 0.6, 0.7]))

    assert_dropped_in_time(http, abandon_all)


def test_a_client_cannot_keep_a_request_running_after_it_disconnects(http: httpx.Client) -> None:
    header = {"x-request-disconnect-disabled": "?1"}  # Serve would obey it

    def abandon() -> None:
        with pytest.raises(httpx.TimeoutException):
            http.post("/v1/completions", json=completion(stream=False), headers=header, timeout=0.5)

    assert_dropped_in_time(http, abandon)


def test_a_client_that_sends_too_slowly_is_disconnected(
    cluster: RunningCluster, http: httpx.Client
) -> None:
    url = httpx.URL(cluster.http_url)
    timeout_s = RouterConfig().header_timeout_s + 60

    def response_to(start: bytes) -> bytes:
        with socket.create_connection((url.host, url.port or 80), timeout_s) as connection:
            connection.sendall(start)
            return connection.recv(1024)

    half_a_header = b"POST /v1/comple"
    half_a_body = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{"
    with ThreadPoolExecutor(2) as threads:
        for response in threads.map(response_to, [half_a_header, half_a_body]):
            assert response.startswith(b"HTTP/1.1 408")


# -- logs --------------------------------------------------------------------------------------


def test_the_log_of_a_generator_goes_on_after_vllm_was_imported(
    cluster: RunningCluster, http: httpx.Client
) -> None:
    name = f"generator-{MODEL}"
    logs = log_directory(cluster.home) / "serve"
    ids = [id_ for id_, found in cluster.replicas().items() if found == (name, "RUNNING")]
    assert ids
    for id_ in ids:
        log = logs / f"replica_tandem_{name}_{id_}.log"

        def is_complete(log: Path = log) -> bool:
            text = log.read_text(encoding="utf-8")
            return "vLLM is ready" in text and "Finished initializing replica" in text

        wait_until(is_complete, 60, "writing the log")
