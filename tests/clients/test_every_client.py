"""Answers, errors, retries and time limits, the same with every client."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.clients.asking import CLIENTS, Client, Question
from tests.clients.conftest import Server

RETRY_AFTER_S = 1
"""``Retry-After`` of a request over ``max_concurrent``."""


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    return CLIENTS[request.param]


@contextmanager
def occupied(server: Server) -> Iterator[None]:
    """Occupy the only slot of the limited tenant for 1.5 s."""
    headers = {"Authorization": f"Bearer {server.limited_key}"}
    body = {"model": "slow", "prompt": "Hello", "max_tokens": 15, "stream": True}
    with httpx.Client(base_url=server.openai_url, headers=headers, timeout=60) as http:
        deadline = time.monotonic() + 60  # the test before may still hold the slot
        while time.monotonic() < deadline:
            with http.stream("POST", "/completions", json=body) as answer:
                if answer.status_code == httpx.codes.OK:
                    yield
                    return
            time.sleep(0.1)
    pytest.fail("The slot did not become free.")


def test_a_question_is_answered(server: Server, client: Client) -> None:
    assert "Paris" in client.ask(Question(server))


def test_errors_raise_the_clients_own_exceptions(server: Server, client: Client) -> None:
    with pytest.raises(client.unknown_model, match="The model `nix` does not exist"):
        client.ask(Question(server, model="nix"))
    with pytest.raises(client.bad_request, match="max_model_len=2048"):
        client.ask(Question(server, max_tokens=100_000))
    with pytest.raises(client.wrong_key, match="Unknown API key"):
        client.ask(Question(server, key="sk-wrong"))
    with pytest.raises(client.unavailable, match="no replica became ready in time"):
        client.ask(Question(server, model="asleep"))


def test_a_client_that_waits_no_longer_raises_its_timeout(server: Server, client: Client) -> None:
    # 100 tokens take 10 s.
    with pytest.raises(client.timed_out):
        client.ask(Question(server, model="slow", max_tokens=100, timeout_s=0.5))


@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if client.retries])
def test_a_request_over_a_limit_is_retried_after_the_given_time(server: Server, name: str) -> None:
    ask = Question(server, key=server.limited_key, model="slow", max_tokens=1, retries=4)
    if name == "instructor":  # wants JSON, which the simulated model does not write
        ask = Question(server, key=server.limited_key, retries=4)
    for _ in range(5):  # on a slow machine, the slot may be free before the client's first request
        with occupied(server):
            start = time.monotonic()
            assert CLIENTS[name].ask(ask)
            if time.monotonic() - start >= RETRY_AFTER_S:
                return
    pytest.fail("The client did not wait.")
