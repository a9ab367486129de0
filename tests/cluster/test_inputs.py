"""Malformed requests to a real cluster: HAProxy, Ray Serve, the router, vLLM and a classifier.

Nothing that a client sends causes a 5xx, a hang, or an answer that is not in its API's format.
"""

import json
import socket

import anthropic
import httpx
import pytest

from tests.cluster.conftest import RunningCluster
from tests.cluster.malformed import (
    BODIES,
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    STRUCTURED_OUTPUTS,
    UNMATCHABLE,
    USER,
    malformed,
    problem_of,
)


def problem(answer: httpx.Response, path: str) -> str | None:
    return problem_of(path, answer.status_code, answer.headers, answer.content)


@pytest.mark.parametrize("path", BODIES)
def test_malformed_bodies(http: httpx.Client, path: str) -> None:
    problems = []
    for name, body, status in malformed(path, BODIES[path]["model"]):
        headers = {"content-type": "application/json"}
        if name.startswith("max_"):
            headers["x-request-timeout-seconds"] = "1"  # some mean as many tokens as fit
        answer = http.post(path, content=body, headers=headers)
        found = problem(answer, path)
        if found is None and status not in (None, answer.status_code):
            found = f"{answer.status_code} instead of {status}: {answer.text[:200]}"
        if found is not None:
            problems.append(f"{name}: {found}")
    assert not problems, "\n".join(problems)
    assert http.post(path, json=BODIES[path]).status_code == 200


def test_headers_and_paths(http: httpx.Client) -> None:
    names = [
        *("x-session-id", "x-request-id", "x-request-timeout-seconds", "x-tandem-priority"),
        *("accept", "authorization", "content-type", "cookie", "serve_multiplexed_model_id"),
        *("traceparent", "tracestate", "user-agent", "x-api-key", "x-request-disconnect-disabled"),
        *("anthropic-beta", "baggage", "content-encoding", "x-tandem-usage", "x-unknown"),
    ]
    problems = {}
    for path in (CHAT, MESSAGES, "/classify"):
        for name in names:
            for value in (b"\xe9", b"\xff\xfe", b"a" * 3000) if path == CHAT else (b"\xe9",):
                headers = [(b"content-type", b"application/json"), (name.encode(), value)]
                if name == "content-type":
                    headers.pop(0)
                content = json.dumps(BODIES[path]).encode()
                answer = http.post(path, content=content, headers=headers)
                if found := problem(answer, path):
                    problems[path, name, value[:5]] = found
    for path in (
        "/v1/models/%ff%fe",
        "/v1/messages/%e9",
        "/v1/messages/nowhere",
        "/x" * 999,
    ):
        answer = http.get(path)
        if answer.status_code != 404 or problem(answer, path):
            problems["GET", path[:30], b""] = answer.text[:300]
    assert not problems


def test_methods(http: httpx.Client) -> None:
    problems = {}
    # vLLM has GET /v1/responses/{id}.
    paths = [path for path in BODIES if path != "/v1/responses/input_tokens"]
    for path in (*paths, "/health", "/v1/models", "/version", "/openapi.json", "/metrics"):
        methods = ("GET", "PUT", "DELETE", "PATCH") if path in BODIES else ("POST", "PUT", "DELETE")
        for method in methods:
            answer = http.request(method, path)
            found = problem(answer, path)
            if found or answer.status_code != 405 or not answer.headers.get("allow"):
                problems[method, path] = found or f"{answer.status_code} {answer.headers}"
    assert not problems


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_structured_outputs_that_cannot_be_compiled(http: httpx.Client, path: str) -> None:
    good = http.post(path, json={**BODIES[path], "structured_outputs": {"choice": ["a", "b"]}})
    assert good.status_code == 200
    problems = {}
    for wanted in (*STRUCTURED_OUTPUTS, UNMATCHABLE):
        # vLLM begins a stream of responses before it checks this.
        for stream in (False,) if path == RESPONSES else (False, True):
            body = {**BODIES[path], "structured_outputs": wanted, "stream": stream}
            answer = http.post(path, json=body)
            if answer.status_code != 400 or problem(answer, path):
                problems[str(wanted), stream] = f"{answer.status_code} {answer.text[:300]}"
    assert not problems


def test_deadlines(http: httpx.Client) -> None:
    for path in (CHAT, COMPLETIONS):
        body = {**BODIES[path], "max_tokens": 1500, "ignore_eos": True}
        headers = {"x-request-timeout-seconds": "0.7"}
        answer = http.post(path, json=body, headers=headers)
        # 429 if the router knows that the model is too slow for so many tokens.
        assert answer.status_code in (408, 429), answer.text
        assert problem(answer, path) is None


def exchange(url: str, request: bytes) -> tuple[bytes, bytes]:
    """Send bytes; return head and body of the answer until the connection closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    return head.lower(), body


def test_http10_clients_get_no_chunks(cluster: RunningCluster) -> None:
    for stream in (False, True):
        content = json.dumps({**BODIES[CHAT], "stream": stream}).encode()
        lines = f"POST {CHAT} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: "
        head, body = exchange(
            cluster.http_url, lines.encode() + str(len(content)).encode() + b"\r\n\r\n" + content
        )
        assert b" 200 " in head
        assert b"transfer-encoding" not in head
        assert body.startswith(b"data: {") if stream else json.loads(body)["choices"]


def test_anthropics_fields(cluster: RunningCluster, http: httpx.Client) -> None:
    answer = http.post(MESSAGES, json=BODIES[MESSAGES])
    assert answer.json()["stop_sequence"] is None
    assert answer.json()["stop_reason"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    with anthropic.Anthropic(base_url=cluster.http_url, api_key="x", max_retries=0) as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            client.messages.create(model="nope", messages=USER, max_tokens=2)  # type: ignore[arg-type]
        assert missing.value.request_id
        assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_input_tokens_of_a_response(http: httpx.Client) -> None:
    body = {**BODIES[RESPONSES], "input": "What is the capital of France?"}
    counted = http.post("/v1/responses/input_tokens", json=body).json()
    used = http.post(RESPONSES, json=body).json()["usage"]["input_tokens"]
    assert counted == {"object": "response.input_tokens", "input_tokens": used}
    assert http.get("/version").json()["version"]
