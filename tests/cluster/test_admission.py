"""Admission as the clients of a real engine see it."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

MODEL = "smollm2"

pytestmark = pytest.mark.timeout(300)


def complete(http: httpx.Client, max_tokens: int, **options: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True}
    return http.post("/v1/completions", json=body, **options)


def test_a_normal_load_is_admitted_after_abandoned_long_requests(http: httpx.Client) -> None:
    def abandon(_: int) -> None:
        with suppress(httpx.TimeoutException):
            complete(http, 1500, timeout=0.5)

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(abandon, range(48)))
        assert complete(http, 200).status_code == 200
        answers = list(threads.map(lambda _: complete(http, 8), range(96)))
    assert Counter(answer.status_code for answer in answers) == {200: 96}


def test_the_router_does_not_hold_back_a_burst_that_the_engine_begins(http: httpx.Client) -> None:
    """The prompts take two steps. Those of the second one wait, next to free slots."""

    def capacity_tokens() -> float:
        series = rf'^tandem_capacity_tokens{{[^}}]*"{MODEL}"[^}}]*}} (\S+)'
        found = re.search(series, http.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return float(found[1])

    def ask(number: int) -> int:
        prompt = f"{number} " + "time " * 127  # not in the prefix cache
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
        return http.post("/v1/completions", json=body).status_code

    before = capacity_tokens()
    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(ask, range(32))) == [200] * 32
    assert capacity_tokens() >= before


def test_a_request_that_never_fits_is_rejected_at_once(http: httpx.Client) -> None:
    error = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "n": 16384}).json()[
        "error"
    ]
    assert (error["code"], error["param"]) == (400, "n")
    ids = {"model": MODEL, "prompt": [1] * 100_000}
    answer = http.post("/v1/completions", json=ids)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "longer than the model's context" in error["message"]


def test_vllm_answers_requests_of_every_priority(http: httpx.Client) -> None:
    for headers in ({"x-vllm-priority": "-99"}, {"x-tandem-priority": "-3"}):
        assert complete(http, 2, headers=headers).status_code == 200
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        assert http.post("/v1/messages", json=body, headers=headers).status_code == 200
