"""``tandem chat``, ``classify``, ``top``, ``status`` and ``usage`` against a scripted router."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.errors import AuthenticationError, NotFoundError, OverloadedError, UnavailableError

Answer = tuple[int, Any]


class FakeRouter:
    """Records requests and responds by path; a list is sent as server-sent events."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Callable[[str, Any], Answer] = lambda path, body: (404, {})
        router = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(None)

            def do_DELETE(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                self.reply(json.loads(self.rfile.read(length)))

            def reply(self, body: Any) -> None:
                router.requests.append((self.path, body))
                router.headers.append(self.headers)
                status, answer = router.answer(self.path, body)
                if isinstance(answer, list):
                    data = "".join(f"data: {json.dumps(event)}\n\n" for event in answer)
                    raw = f"{data}data: [DONE]\n\n".encode()
                else:
                    raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    router = FakeRouter()
    thread = threading.Thread(target=router.server.serve_forever)
    thread.start()
    yield router
    router.server.shutdown()
    router.server.server_close()
    thread.join()


def run(*args: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, args, input=stdin)


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def talk(path: str, body: Any) -> Answer:
    if path == "/v1/models":
        return 200, {"data": [{"id": "gen"}, {"id": "cls"}]}
    return 200, [{"choices": [{"delta": {"role": "assistant"}}]}, delta("Yes"), delta("!")]


def test_chat_streams_answers_and_remembers_them(router: FakeRouter) -> None:
    router.answer = talk
    done = run("chat", "--url", router.url, stdin="One?\n\nTwo?\n/exit\nThree?\n")
    assert (done.exit_code, done.stdout) == (0, "Yes!\nYes!\n")
    (_, first), (_, second) = router.requests[1:]
    assert first == {
        "model": "gen",
        "messages": [{"role": "user", "content": "One?"}],
        "max_tokens": 512,
        "stream": True,
    }
    assert [(m["role"], m["content"]) for m in second["messages"]] == [
        ("user", "One?"),
        ("assistant", "Yes!"),
        ("user", "Two?"),
    ]


def test_chat_sends_its_options(router: FakeRouter) -> None:
    router.answer = talk
    options = ("--model", "m", "--max-tokens", "5", "--temperature", "0", "--api-key", "k")
    run("chat", "--url", router.url, *options, stdin="Hi\n")
    ((path, body),) = router.requests
    assert path == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 5, 0)
    assert router.headers[0]["authorization"] == "Bearer k"


def test_piped_chat_fails_if_a_request_fails(router: FakeRouter) -> None:
    message = {"error": {"message": "no such model", "code": 404}}
    router.answer = lambda path, body: (404, message)
    done = run("chat", "--url", router.url, "--model", "m", stdin="Hi\n")
    assert isinstance(done.exception, NotFoundError)
    assert str(done.exception) == "no such model"


def test_an_error_within_a_stream_is_raised(router: FakeRouter) -> None:
    error = {"error": {"message": "the engine died", "code": 503}}
    router.answer = lambda path, body: (200, [delta("Ye"), error])
    done = run("chat", "--url", router.url, "--model", "m", stdin="Hi\n")
    assert isinstance(done.exception, UnavailableError)
    assert done.stdout == "Ye"


ROW = {"index": 0, "label": "POSITIVE", "score": 0.987654, "scores": []}


def test_classify_prints_a_line_per_text(router: FakeRouter) -> None:
    answer = {"data": [ROW, {**ROW, "index": 1, "label": "NEGATIVE"}]}
    router.answer = lambda path, body: (200, answer)
    done = run("classify", "--url", router.url, "good [film]", "bad")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "POSITIVE  0.988  good [film]",
        "NEGATIVE  0.988  bad        ",
    ]
    assert router.requests == [("/classify", {"input": ["good [film]", "bad"]})]


def test_classify_prints_json(router: FakeRouter) -> None:
    router.answer = lambda path, body: (200, {"data": [ROW]})
    done = run("classify", "--url", router.url, "--json", "--model", "c", "good")
    assert json.loads(done.stdout) == {"data": [ROW]}
    assert router.requests == [("/classify", {"input": ["good"], "model": "c"})]


@pytest.mark.parametrize(("status", "kind"), [(401, AuthenticationError), (429, OverloadedError)])
def test_error_responses_raise_typed_errors(
    router: FakeRouter, status: int, kind: type[Exception]
) -> None:
    router.answer = lambda path, body: (status, "not our format")
    done = run("classify", "--url", router.url, "x")
    assert isinstance(done.exception, kind)
    assert done.exit_code == 1


def test_an_unreachable_router_is_reported() -> None:
    done = run("classify", "--url", "http://127.0.0.1:9", "x")
    assert isinstance(done.exception, UnavailableError)
    assert "no router responds" in str(done.exception)


COLUMNS = ["requests", "failed", "completion_tokens", "ttft_p50", "ttft_p99", "itl_p50"]
COLUMNS += ["itl_p99", "total_p90", "in_flight", "queued", "kv_cache"]
DATA: dict[str, Any] = {
    "now": 1e9,
    "routers": {"a": True, "b": False},
    "columns": COLUMNS,
    "times": [1, 2],
    "rows": {
        "": [[2.0, 0.0, 50.0, 0.01, 0.02, None, None, 1.5, 3, 0, 0.25]] * 2,
        "gen": [[2.0, 1.0, n, 0.01, 0.02, None, None, 1.5, 3, 0, 0.25] for n in (25.0, 50.0)],
    },
    "pools": {
        "gen": {
            "kind": "generator",
            "replicas": [
                {"id": "gen-1", "state": "linked", "ongoing": 3, "running": 2, "waiting": 1}
                | {"kv_cache": 0.25}
            ],
        }
    },
    "levels": {
        name: {"in_flight": 3, "queued": 0, "running": 2, "waiting": 1, "kv_cache": 0.25}
        for name in ("", "gen")
    },
    "decisions": [
        {"time": 1e9, "pool": "gen", "before": 1, "target": 2, "cause": "busy", "reason": "[b]"}
    ],
    "failures": [
        {"time": 1e9, "id": "[red]id", "model": "gen", "route": "/x", "status": 503, "type": "T"}
    ],
}


def test_top_prints_a_frame(router: FakeRouter) -> None:
    router.answer = lambda path, body: (200, DATA)
    done = CliRunner().invoke(app, ["top", "--once", "--url", router.url], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    for text in (
        "2 router(s)",
        "no response from b",
        "gen-1",
        "1.50 s",
        "20.0 ms",
        "25%",
        "▄█",
        "1 → 2",
    ):
        assert text in done.stdout
    assert "[red]id" in done.stdout
    assert "busy: [b]" in done.stdout
    assert router.requests[0][0].startswith("/dashboard/data?since=")


@pytest.mark.parametrize(("columns", "omitted"), [(80, ("p50", "/x", "▄█")), (120, ("▄█",))])
def test_top_omits_columns_on_narrow_terminals(
    router: FakeRouter, columns: int, omitted: tuple[str, ...]
) -> None:
    failure = {
        "time": 1e9,
        "id": "28f87326-8e18-45d0-ad35-a1df7c62fb5d",
        "model": "sentiment",
        "route": "/x",
        "status": 500,
        "type": "InternalServerError",
    }
    router.answer = lambda path, body: (200, {**DATA, "failures": [failure]})
    done = CliRunner().invoke(
        app, ["top", "--once", "--url", router.url], env={"COLUMNS": str(columns)}
    )
    assert "…" not in done.stdout
    assert failure["id"] in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert not [text for text in omitted if text in done.stdout]


def test_top_works_without_data(router: FakeRouter) -> None:
    empty = {**DATA, "rows": {"": [], "gen": []}, "times": [], "failures": [], "pools": {}}
    router.answer = lambda path, body: (200, empty)
    assert run("top", "--once", "--url", router.url).exit_code == 0


def test_top_raises_the_error_of_its_first_request(router: FakeRouter) -> None:
    router.answer = lambda path, body: (401, {"error": {"message": "no key", "code": 401}})
    assert isinstance(run("top", "--url", router.url).exception, AuthenticationError)


@pytest.mark.parametrize("ready", [True, False])
def test_status_of_a_remote_cluster_comes_from_its_router(router: FakeRouter, ready: bool) -> None:
    router.answer = lambda path, body: (
        (200, DATA) if "data" in path else (200 if ready else 503, {"status": ""})
    )
    shown = run("--address", f"{router.url}/", "status", "--api-key", "k")
    assert shown.exit_code == 0
    lines = [line.rstrip() for line in shown.stdout.splitlines()]
    assert lines[:3] == [
        f"HTTP     {router.url}",
        f"state    {'ready' if ready else 'not ready'}",
        "routers  2, no response from b",
    ]
    assert "gen-1" in shown.stdout
    assert {headers["authorization"] for headers in router.headers} == {"Bearer k"}
    found = json.loads(run("status", "--url", router.url, "--json").stdout)
    assert (found["ready"], found["pools"]) == (ready, DATA["pools"])


USAGE: dict[str, Any] = {
    "currency": "EUR",
    "data": [
        {"hour": hour, "tenant": "acme", "model": "gen", "requests": 600, "prompt_tokens": 2000}
        | {"cached_tokens": 0, "completion_tokens": 10, "joules": joules, "cost": 0.25}
        for hour, joules in (("2026-01-01T00:00:00Z", None), ("2026-01-01T01:00:00Z", 1500.0))
    ],
}


def test_usage_is_summed_by_tenant_and_model(router: FakeRouter) -> None:
    router.answer = lambda path, body: (200, USAGE)
    shown = run("--address", router.url, "usage", "--start", "2026-01-01", "--tenant", "acme")
    assert shown.stdout.splitlines()[1].split() == [
        *("acme", "gen", "1,200", "4,000", "0", "20", "1.50", "0.50"),
    ]
    assert "cost EUR" in shown.stdout
    assert router.requests == [("/v1/usage?start=2026-01-01&tenant=acme", None)]
    assert json.loads(run("usage", "--url", router.url, "--json").stdout) == USAGE


def test_address_reaches_the_commands_of_groups(router: FakeRouter) -> None:
    router.answer = lambda path, body: (200, {"rollouts": []})
    run("--address", router.url, "rollout", "status")
    assert router.requests == [("/v1/rollouts", None)]


def test_address_reaches_the_test_of_guards(router: FakeRouter, tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text\nx\n")
    run("--address", router.url, "guard", "test", str(file))
    assert [path for path, _ in router.requests] == ["/v1/guards/test"]


@pytest.mark.parametrize("command", ["doctor", "down"])
def test_commands_for_the_machines_of_the_cluster_refuse_an_address(command: str) -> None:
    done = CliRunner().invoke(app, ["--address", "http://h", command], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert f"`tandem {command}` runs on the machines of the cluster only" in done.output


@pytest.mark.parametrize(("outcome", "status"), [("blocked", 0), ("passed", 1), ("refused", 1)])
def test_guards_are_tested_with_the_texts_of_a_file(
    router: FakeRouter, tmp_path: Path, outcome: str, status: int
) -> None:
    found = {"label": "BAD", "score": 0.9, "start": 0, "end": 1}

    def answer(_path: str, body: Any) -> Answer:
        guard = {"guard": "g", "action": "block", "outcome": outcome, "found": [found]}
        result = {"outcome": outcome, "guards": [guard]}
        return 200, {"data": [{**result, "text": text} for text in body["input"]]}

    router.answer = answer
    file = tmp_path / "texts.csv"
    file.write_text("text,expected\n" + "x,blocked\n" * 70)
    options = ("--expect-column", "expected", "--guard", "g", "--answers", "--url", router.url)
    done = run("guard", "test", str(file), *options)
    assert done.exit_code == status
    assert f"70 texts: 70 {outcome}" in done.stdout
    bodies = [body for _, body in router.requests]
    assert [len(body["input"]) for body in bodies] == [64, 6]
    assert bodies[0]["guards"] == ["g"]
    assert bodies[0]["stage"] == "answer"
    lines = json.loads(run("guard", "test", str(file), "--json", "--url", router.url).stdout)
    assert lines[0] | {"line": 2, "expected": None} == lines[0]


def test_an_unknown_outcome_in_a_file_of_texts_is_rejected(
    router: FakeRouter, tmp_path: Path
) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,expected\nx,harmless\n")
    done = run("guard", "test", str(file), "--expect-column", "expected", "--url", router.url)
    assert "texts.csv:2: got 'harmless'" in str(done.exception)
    assert not router.requests
