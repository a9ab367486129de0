"""Format of every error: that of the path's API, of bounded size, whoever reports it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from cluster.asgi import Receive, Scope, Send
from cluster.errors import MAX_MESSAGE_CHARS
from cluster.gateway.error_formats import engine_error_body
from tests import asgi
from tests.serve.gateway_kit import CHAT, World, gateway_world, metrics

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
PATHS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT, "/classify")
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    501: "api_error",
    503: "overloaded_error",
}
HUGE = "x" * 1_000_000
MAX_BYTES = 4 * (MAX_MESSAGE_CHARS + 500)  # UTF-8, and the other fields


def check_error(answer: asgi.Answer, path: str, status: int) -> dict[str, Any]:
    """Assert that an answer is an error in the format of the API at ``path``; return the error."""
    assert answer.status == status, answer.body[:500]
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body) <= MAX_BYTES
    body = answer.json()
    error: dict[str, Any] = body["error"]
    assert error["message"]
    assert isinstance(error["message"], str)
    if path.startswith(MESSAGES):
        assert body["type"] == "error"
        assert error["type"] == KINDS[status]
        assert answer.headers["request-id"]
    else:
        assert body.keys() == {"error"}
        assert {"message", "type", "param", "code"} <= error.keys()
        assert error["code"] == status
    return error


class Broken:
    """Engine that answers every request with an error."""

    def __init__(self, status: int, body: bytes, **headers: str) -> None:
        self.status = status
        self.body = body
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status, "headers": self.headers}
        await send(start)
        half = len(self.body) // 2
        first = {"type": "http.response.body", "body": self.body[:half], "more_body": True}
        await send(first)
        await send({"type": "http.response.body", "body": self.body[half:]})


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with gateway_world(max_body_bytes=4_000_000) as made:
        yield made


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (405, b'{"detail":"Method Not Allowed"}', "Method Not Allowed"),
        (400, b'{"detail":"There was an error parsing the body"}', "parsing"),
        (422, b'{"detail":[{"loc":["body"],"msg":"Field required"}]}', "Field required"),
        (400, b'{"error":{"message":"bad","type":"Bad Request","param":"n","code":400}}', "bad"),
        (400, b'{"error":"bad"}', "bad"),
        (400, b'{"message":"bad"}', "bad"),
        (500, b"Internal Server Error", "Internal Server Error"),
        (400, b"\xff\xfe", "\ufffd"),
        (400, b'{"detail":"\\ud800"}', "?"),
        (400, b"[1]", "[1]"),
        (400, b"[" * 100_000, "[["),
        (404, b"", "Not Found"),
        (404, b"{}", "Not Found"),
        (501, b'{"error":{"message":"no","type":"NotImplementedError","code":501}}', "no"),
        (400, json.dumps({"error": {"message": HUGE, "param": HUGE}}).encode(), "characters"),
        (400, json.dumps({"detail": HUGE}).encode(), "characters"),
        (400, HUGE.encode(), "characters"),
        (400, json.dumps({"detail": "🎉" * 500_000}).encode(), ""),
    ],
)
async def test_errors_of_engines(
    world: World, path: str, status: int, body: bytes, says: str
) -> None:
    app = Broken(status, body, **{"content-type": "text/plain", "allow": "POST"})
    await world.serve(app, "gen", "gen-1", PATHS)
    answer = await asgi.post(world.app, path, {"model": "gen"})
    assert says in check_error(answer, path, status)["message"]
    assert answer.headers["allow"] == "POST"
    assert world.gateway.pools["gen"].num_in_flight == 0


async def test_param_and_retry_after_of_an_engines_error_are_kept(world: World) -> None:
    body = b'{"error":{"message":"bad","type":"x","param":"top_p","code":429}}'
    await world.serve(Broken(429, body, **{"retry-after": "7"}), "gen", "gen-1", PATHS)
    answer = await asgi.post(world.app, CHAT, {"model": "gen"})
    assert check_error(answer, CHAT, 429)["param"] == "top_p"
    assert answer.headers["retry-after"] == "7"


VLLM_TOO_LONG = b"""{"error":{"message":"This model's maximum context length is 8 tokens. However,
your prompt contains at least 9.","type":"BadRequestError","param":"input_tokens","code":400}}"""
TOO_LONG = b'{"error":{"message":"Too long","type":"x","code":"context_length_exceeded"}}'


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [VLLM_TOO_LONG.replace(b"\n", b" "), TOO_LONG])
async def test_prompts_over_the_context(world: World, path: str, body: bytes) -> None:
    await world.serve(Broken(400, body), "gen", "gen-1", PATHS)
    answer = await asgi.post(world.app, path, {"model": "gen"})
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"  # of OpenAI
    # LangChain and Claude Code recognize Anthropic's words.
    is_anthropic = path.startswith(MESSAGES)
    assert error["message"].startswith("prompt is too long: ") == is_anthropic


# -- errors of the router ---------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ({"model": HUGE}, {}, 404),
        ({"model": 3}, {}, 400),
        ({"model": {HUGE: 1}}, {}, 400),
        (b"{", {}, 400),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, {}, 400),
        (b'{"a":' + b"[" * 3000, {}, 400),
        (b'{"model":"gen","x":NaN}', {}, 400),
        (b'{"model":"gen","x":-Infinity}', {}, 400),
        (b'{"model":"gen","x":"\\ud800"}', {}, 400),
        (b" " * 5_000_000, {}, 413),
        ({}, {"x-request-timeout-seconds": "a" * 5000}, 400),
        ({}, {"x-tandem-priority": "9" * 5000}, 400),
        ({}, {"x-unknown": "a" * 70_000}, 431),
    ],
)
async def test_errors_of_the_router(
    world: World, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    await world.add("gen", "gen-1", PATHS)
    answer = await asgi.post(world.app, path, body, headers=headers)
    check_error(answer, path, status)


@pytest.mark.parametrize("path", PATHS)
async def test_missing_keys_and_replicas(path: str) -> None:
    async with gateway_world(api_keys_sha256=["0" * 64]) as world:
        check_error(await asgi.post(world.app, path, {}), path, 401)
    async with gateway_world(queue_timeout_s=0.5) as world:
        check_error(await asgi.post(world.app, path, {"model": "gen"}), path, 503)


@pytest.mark.parametrize("path", ["/nowhere", "/v1/messages/nowhere", "/v1/models/x", "/" + HUGE])
async def test_unknown_paths(world: World, path: str) -> None:
    await world.add("gen", "gen-1", PATHS)
    await world.add("cls", "cls-1", ("/ner",))
    answer = await asgi.get(world.app, path[:20_000])
    check_error(answer, path, 404)


@pytest.mark.parametrize("path", ["/v1/moderations", "/internal/leases", "/v1/messages/nowhere"])
@pytest.mark.parametrize("body", [{}, {"model": "gen"}, {"model": "cls"}])
async def test_unknown_paths_do_not_wait_for_a_replica(path: str, body: Any) -> None:
    async with gateway_world(scales_to_zero=True) as world, asyncio.timeout(60):
        check_error(await asgi.post(world.app, path, body), path, 404)
        answer = await asgi.post(world.app, "/ner", {"model": "gen"})
        assert "Models that do: cls" in check_error(answer, "/ner", 400)["message"]
        assert not world.gateway.pools["gen"].num_queued


# -- methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/metrics"])
async def test_methods_of_builtin_paths(world: World, path: str) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"):
        answer = await asgi.call(world.app, method, path)
        assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
        assert method in check_error(answer, path, 405)["message"]
    options = await asgi.call(world.app, "OPTIONS", path)
    assert (options.status, options.body) == (204, b"")
    assert options.headers["allow"] == "GET, HEAD, OPTIONS"
    head = await asgi.call(world.app, "HEAD", path)
    assert (head.status, head.body) == (200, b"")


# -- deadlines --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
async def test_deadline_before_the_answer(world: World, path: str) -> None:
    replica = await world.add("gen", "gen-1", PATHS)
    body = {"model": "gen", "wait_before": True}
    headers = {"x-request-timeout-seconds": "0.1"}
    answer = await asgi.post(world.app, path, body, headers=headers)
    check_error(answer, path, 408)
    await world.until(lambda: replica.cancelled == 1)
    await world.until_idle()
    assert (await metrics(world))["tandem_requests_total", "gen", path, "408"] == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_deadline_during_a_stream(world: World, path: str) -> None:
    replica = await world.add("gen", "gen-1", PATHS)
    body = {"model": "gen", "stream": 2, "wait_after": True}
    answer = await asgi.post(world.app, path, body, headers={"x-request-timeout-seconds": "0.2"})
    assert answer.status == 200
    assert [data for _, data in answer.events()[:2]] == ["0", "1"]
    last = answer.data()[-1]
    assert "x-request-timeout-seconds" in json.dumps(last)
    await world.until(lambda: replica.cancelled == 1)
    await world.until_idle()
    assert (await metrics(world))["tandem_requests_total", "gen", path, "408"] == 1


async def test_deadline_of_an_answer_that_is_not_a_stream_closes_the_connection(
    world: World,
) -> None:
    class Slow:
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"[", "more_body": True})
            await asyncio.Future()

    await world.serve(Slow(), "gen", "gen-1", PATHS)
    headers = {"x-request-timeout-seconds": "0.1"}
    with pytest.raises(ConnectionResetError, match="x-request-timeout-seconds"):
        await asgi.post(world.app, CHAT, {"model": "gen"}, headers=headers)
    await world.until_idle()


async def test_an_answer_in_time_is_complete(world: World) -> None:
    await world.add("gen", "gen-1", PATHS)
    headers = {"x-request-timeout-seconds": "30"}
    answer = await asgi.post(world.app, CHAT, {"model": "gen", "stream": 50}, headers=headers)
    assert len(answer.events()) == 50


def test_an_empty_error_with_an_unusual_status_has_a_message() -> None:
    for status, message in ((418, "I'm a Teapot"), (499, "Status 499"), (599, "Status 599")):
        error = json.loads(engine_error_body(CHAT, status, b""))["error"]
        assert error["message"] == message
        assert error["code"] == status
