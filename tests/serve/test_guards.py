"""Guards in the path of a request, with scripted generators and classifiers behind real links."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from itertools import pairwise
from typing import Any

import pytest

from cluster.asgi import Receive, Scope, Send
from cluster.config import parse
from cluster.key_file import KeyFile
from tests import asgi
from tests.serve.gateway_kit import World, gateway_world, metrics
from tests.serve.scripted_generator import (
    APIS,
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    ROUTES,
    ScriptedGenerator,
    prompt_of,
    request_for,
    streamed_text,
    text_of,
)

CARD, MAIL = "4111 1111 1111 1111", "anna@example.com"
PII = {"name": "pii", "patterns": ["card", "email"]}
INJECTION = {
    "name": "injection",
    "classifier": "cls",
    "labels": ["BAD"],
    "action": "block",
    "checks": "prompt",
    "timeout_s": 60,
}
CHECKS = "tandem_guard_checks_total"


class ScriptedClassifier:
    """Classifier that labels a text as BAD if it contains the word, and finds names `Xaver …`."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.fails = False
        self.headers: list[dict[str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        body = json.loads((await receive())["body"])
        self.texts += body["input"]
        self.options.append({name: value for name, value in body.items() if name != "input"})
        await self.answers.wait()
        is_classify = scope["path"] == "/classify"
        data = [self._label(text) if is_classify else self._find(text) for text in body["input"]]
        start = {"type": "http.response.start", "headers": []}
        await send({**start, "status": 500 if self.fails else 200})
        await send({"type": "http.response.body", "body": json.dumps({"data": data}).encode()})

    def _label(self, text: str) -> dict[str, Any]:
        score = 0.9 if "bad" in text else 0.1
        return {"scores": [{"label": "BAD", "score": score}, {"label": "OK", "score": 1 - score}]}

    def _find(self, text: str) -> dict[str, Any]:
        start = text.find("Xaver")
        if start < 0:
            return {"entities": []}
        rest = text[start:].split(" ", 2)
        end = start + len(" ".join(rest[:2]))
        return {"entities": [{"label": "PER", "score": 0.9, "start": start, "end": end}]}


class Site:
    def __init__(self, world: World, generator: ScriptedGenerator) -> None:
        self.world = world
        self.app = world.app
        self.generator = generator
        self.classifier = ScriptedClassifier()

    async def post(self, path: str, text: str, **fields: Any) -> asgi.Answer:
        return await asgi.post(self.app, path, request_for(path, text, **fields))

    async def counts(self, guard: str, stage: str) -> dict[str, float]:
        found = await metrics(self.world)
        prefix = (CHECKS, guard, "gen")
        return {
            key[3]: value
            for key, value in found.items()
            if key[:3] == prefix and key[-1] == stage and value
        }


@asynccontextmanager
async def guarded(
    *guards: dict[str, Any], reply: Any = None, tasks: tuple[str, ...] = ("classify",), **kit: Any
) -> AsyncIterator[Site]:
    """Run a router whose generator repeats the prompt in parts of 3 characters."""
    async with gateway_world(
        guards=list(guards), classifier={"tasks": list(tasks)}, **kit
    ) as world:
        site = Site(world, ScriptedGenerator(reply or (lambda body: parts(prompt_of(body)))))
        await world.serve(site.generator, "gen", "gen-1", ROUTES)
        await world.serve(site.classifier, "cls", "cls-1", ("/classify", "/token-classification"))
        yield site


def parts(text: str, size: int = 3) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def saying(text: str) -> Any:
    return lambda _body: parts(text)


# -- prompts --


@pytest.mark.parametrize("path", APIS)
async def test_redacted_values_never_reach_the_engine_and_are_restored(path: str) -> None:
    text = f"Mail {MAIL} about {CARD} or {MAIL}"
    async with guarded({**PII, "action": "redact", "checks": "prompt"}) as site:
        answer = await site.post(path, text)
        assert answer.headers["x-tandem-guard"] == "pii=redacted"
        assert text_of(path, answer.json()) == text
        stream = await site.post(path, text, stream=True)
        assert streamed_text(path, stream.data()) == text
        for body in site.generator.bodies:
            assert prompt_of(body) == "Mail [EMAIL_1] about [CARD_1] or [EMAIL_1]"
        assert await site.counts("pii", "prompt") == {"redacted": 2}


@pytest.mark.parametrize("path", APIS)
async def test_a_blocked_prompt_is_an_error_of_its_api_and_cancels_the_engine(path: str) -> None:
    async with guarded(INJECTION) as site:
        site.generator.begins.clear()
        answer = await site.post(path, "a bad one")
        assert answer.status == 400
        assert answer.headers["x-tandem-guard"] == "injection=blocked"
        error = answer.json()["error"]
        assert error["code"] == "content_filter"
        assert error["type"] == ("invalid_request_error" if path == MESSAGES else "BadRequestError")
        assert "`injection`" in error["message"]
        await site.world.until_idle()
        await site.world.until(lambda: site.generator.cancelled == 1)
        found = await metrics(site.world)
        assert found["tandem_requests_total", "gen", path, "400"] == 1
        assert not any(key[0] == "tandem_requests_total" and "499" in key for key in found)


async def test_the_first_byte_waits_for_the_verdict() -> None:
    async with guarded(INJECTION) as site:
        site.classifier.answers.clear()
        call = asgi.start(site.app, "POST", CHAT, request_for(CHAT, "a good one", stream=True))
        await site.world.until(lambda: bool(site.generator.bodies and site.classifier.texts))
        await asyncio.sleep(0.05)
        assert not call.answer.status
        site.classifier.answers.set()
        assert streamed_text(CHAT, (await call.done()).data()) == "a good one"
        assert "x-tandem-guard" not in call.answer.headers
        assert await site.counts("injection", "prompt") == {"passed": 1}


async def test_a_disconnect_cancels_the_check_and_the_engine() -> None:
    async with guarded(INJECTION) as site:
        site.classifier.answers.clear()
        site.generator.begins.clear()
        call = asgi.start(site.app, "POST", CHAT, request_for(CHAT, "x"))
        await site.world.until(lambda: bool(site.generator.bodies and site.classifier.texts))
        await call.cancel()
        await site.world.until(lambda: site.generator.cancelled == 1)
        await site.world.until_idle()


async def test_classifiers_of_whole_texts_judge_users_and_tools_only() -> None:
    messages = [
        {"role": "system", "content": "bad system"},
        {"role": "assistant", "content": "bad assistant"},
        {"role": "user", "content": "good"},
    ]
    async with guarded(INJECTION) as site:
        body = {"model": "gen", "messages": messages}
        assert (await asgi.post(site.app, CHAT, body)).status == 200
        assert site.classifier.texts == ["good"]
        body["messages"] = [*messages, {"role": "tool", "content": "bad"}]
        assert (await asgi.post(site.app, CHAT, body)).status == 400


async def test_a_message_is_read_in_the_same_way_in_each_turn() -> None:
    # The classifier's result cache distinguishes texts by how they are read.
    async with guarded(INJECTION) as site:
        messages = [{"role": "user", "content": "good"}]
        for more in ("good " * 1000, "good"):
            await asgi.post(site.app, CHAT, {"model": "gen", "messages": messages})
            messages.append({"role": "user", "content": more})
        first, second = site.classifier.options
        assert first == second
        assert first["stride"] > 0


async def test_a_flagged_prompt_is_answered_with_a_header() -> None:
    async with guarded({**PII, "action": "flag"}) as site:
        answer = await site.post(CHAT, MAIL)
        assert answer.status == 200
        assert answer.headers["x-tandem-guard"] == "pii=flagged"
        assert text_of(CHAT, answer.json()) == MAIL
        assert await site.counts("pii", "answer") == {"flagged": 1}


async def test_an_entity_classifier_redacts_prompts() -> None:
    guard = {"name": "names", "classifier": "cls", "action": "redact", "checks": "prompt"}
    async with guarded(guard, tasks=("token-classification",)) as site:
        answer = await site.post(CHAT, "Ask Xaver Huber today")
        assert prompt_of(site.generator.bodies[0]) == "Ask [PER_1] today"
        assert text_of(CHAT, answer.json()) == "Ask Xaver Huber today"


async def test_bodies_that_are_no_json_are_refused() -> None:
    async with guarded({**PII, "action": "redact"}) as site:
        number = b'{"model": "gen", "messages": [], "n": ' + b"1" * 5000 + b"}"
        deep = b'{"model": "gen", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        for body in (b"{", b'{"model": "gen", "messages": "\xff"}', b"[]", number, deep):
            assert (await asgi.post(site.app, CHAT, body)).status == 400, body
        headers = {"content-type": "multipart/form-data"}
        assert (await asgi.post(site.app, CHAT, b"x", headers=headers)).status == 400
        assert not site.generator.bodies


@pytest.mark.parametrize("action", ["block", "redact"])
async def test_what_cannot_be_checked_is_refused(action: str) -> None:
    async with guarded({**PII, "action": action}) as site:
        for path, body in {
            "/inference/v1/generate": {"token_ids": [1]},
            COMPLETIONS: {"prompt": [1, 2]},
        }.items():
            answer = await asgi.post(site.app, path, {"model": "gen", **body})
            assert answer.status == 400, answer.body
        assert (await asgi.get(site.app, "/v1/responses/resp_1")).status == 400
        assert not site.generator.bodies
        assert (await site.post("/tokenize", "x")).status == 200


# -- failing guards --


@pytest.mark.parametrize("on_error", ["open", "closed"])
@pytest.mark.parametrize("failure", ["error", "timeout", "missing"])
async def test_a_failing_guard_is_open_or_closed(on_error: str, failure: str) -> None:
    guard = {**INJECTION, "on_error": on_error, "timeout_s": 0.3 if failure != "error" else 30}
    async with guarded(guard) as site:
        site.classifier.fails = failure == "error"
        if failure == "timeout":
            site.classifier.answers.clear()
        if failure == "missing":
            site.world.remove("cls", "cls-1")
        answer = await site.post(CHAT, "hello")
        if on_error == "open":
            assert answer.status == 200
            assert answer.headers["x-tandem-guard"] == "injection=unchecked"
        else:
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"
            assert "`injection`" in answer.json()["error"]["message"]
        outcome = "unchecked" if on_error == "open" else "refused"
        assert await site.counts("injection", "prompt") == {outcome: 1}
        site.classifier.answers.set()
        await site.world.until_idle()


async def test_a_client_cannot_make_an_open_guard_fail() -> None:
    guard = {**INJECTION, "on_error": "open", "timeout_s": 2}
    async with guarded(guard) as site:
        # Half of a surrogate pair, which UTF-8 cannot encode.
        call = {"function": {"name": "f", "arguments": r'{"a": "bad \ud800"}'}}
        body = request_for(CHAT, "x")
        body["messages"][0]["tool_calls"] = [call]
        answer = await asgi.post(site.app, CHAT, body)
        assert answer.json()["error"]["code"] == "content_filter", answer.body
        site.classifier.answers.clear()
        assert (await site.post(CHAT, "word " * 10)).status == 200
        answer = await site.post(CHAT, "word " * 10_000)
        assert answer.status == 400
        assert answer.headers["x-tandem-guard"] == "injection=unreadable"
        expected = {"blocked": 1, "unchecked": 1, "unreadable": 1}
        assert await site.counts("injection", "prompt") == expected
        site.classifier.answers.set()
        await site.world.until_idle()


async def test_rights_and_quotas_precede_guards(tmp_path: Any) -> None:
    file = key_file(
        tmp_path,
        {"key": "limited", "tenant": "a"},
        {"key": "other", "tenant": "b", "models": ["cls"]},
        tenants={"a": {"requests_per_minute": 1}},
    )
    names = {"name": "names", "classifier": "cls", "action": "redact", "checks": "prompt"}
    async with guarded(names, key_file=file, tasks=("token-classification",)) as site:

        async def post(path: str, key: str) -> int:
            body = request_for(path, "x") if path == CHAT else {"input": "x"}
            return (await asgi.post(site.app, path, body, headers={"x-api-key": key})).status

        assert await post(CHAT, "limited") == 200
        seen = len(site.classifier.texts)
        assert await post(CHAT, "limited") == 429
        assert await post(CHAT, "other") == 403
        assert await post("/v1/guards/test", "limited") == 429
        assert len(site.classifier.texts) == seen


async def test_a_request_that_guards_refuse_frees_its_quota(tmp_path: Any) -> None:
    file = key_file(tmp_path, {"key": "k", "tenant": "a"}, tenants={"a": {"max_concurrent": 1}})
    async with guarded({**PII, "action": "block"}, INJECTION, key_file=file) as site:
        for text in (MAIL, "bad", "good", MAIL, "good"):
            body, headers = request_for(CHAT, text), {"x-api-key": "k"}
            answer = await asgi.post(site.app, CHAT, body, headers=headers)
            assert answer.status == (200 if text == "good" else 400), answer.body
            await site.world.until_idle()


async def test_the_time_of_guards_counts_for_deadline_and_latency() -> None:
    names = {"name": "names", "classifier": "cls", "action": "redact", "checks": "prompt"}
    names["timeout_s"] = 60
    async with guarded(names, tasks=("token-classification",)) as site:
        site.classifier.answers.clear()
        headers = {"x-request-timeout-seconds": "0.2"}
        answer = await asgi.post(site.app, CHAT, request_for(CHAT, "x"), headers=headers)
        assert answer.status == 408
        call = asgi.start(site.app, "POST", CHAT, request_for(CHAT, "y"))
        await site.world.until(lambda: "y" in site.classifier.texts)
        await asyncio.sleep(0.3)
        site.classifier.answers.set()
        assert (await call.done()).status == 200
        await site.world.until_idle()
        found = await metrics(site.world)
        assert found["tandem_request_seconds_sum", "gen"] > 0.25
        assert found["tandem_queue_seconds_sum", "gen"] < found["tandem_request_seconds_sum", "gen"]
        assert not site.world.gateway.num_open_requests


async def test_the_log_of_checks_has_no_text(caplog: pytest.LogCaptureFixture) -> None:
    names = {"name": "names", "classifier": "cls", "action": "redact", "checks": "prompt"}
    kit = {"tasks": ("token-classification",), "log_prompts": True, "log_requests_per_s": 100}
    async with guarded(names, **kit) as site:
        with caplog.at_level("INFO"):
            headers = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
            body = request_for(CHAT, "Ask Xaver Huber")
            assert (await asgi.post(site.app, CHAT, body, headers=headers)).status == 200
            await site.world.until_idle()
        assert "[PER_1]" in caplog.text
        assert "Xaver" not in caplog.text
        assert site.classifier.headers[0]["traceparent"] == headers["traceparent"]


# -- answers --


@pytest.mark.parametrize("path", APIS)
async def test_values_in_answers_are_redacted_in_every_field(path: str) -> None:
    text = f"The card {CARD} of {MAIL}."
    expected = "The card [CARD_1] of [EMAIL_1]."
    async with guarded({**PII, "action": "redact", "checks": "answer"}, reply=saying(text)) as site:
        answer = await site.post(path, "x")
        assert answer.headers["x-tandem-guard"] == "pii=redacted"
        assert text_of(path, answer.json()) == expected
        stream = await site.post(path, "x", stream=True)
        assert streamed_text(path, stream.data()) == expected
        for leak in ("4111", "1111", "anna", "example"):
            assert leak not in answer.body.decode() + stream.body.decode()
        if path == RESPONSES:
            numbers = [event["sequence_number"] for event in stream.data()]
            assert numbers == list(range(len(numbers)))
            assert text_of(RESPONSES, stream.data()[-1]["response"]) == expected
        assert await site.counts("pii", "answer") == {"redacted": 2}


ENDINGS = {
    CHAT: lambda events: events[-1]["choices"][0]["finish_reason"] == "content_filter",
    COMPLETIONS: lambda events: events[-1]["choices"][0]["finish_reason"] == "content_filter",
    RESPONSES: lambda events: (
        events[-1]["type"] == "response.incomplete"
        and events[-1]["response"]["incomplete_details"] == {"reason": "content_filter"}
    ),
    MESSAGES: lambda events: (
        events[-2]["delta"]["stop_reason"] == "refusal" and events[-1]["type"] == "message_stop"
    ),
}


@pytest.mark.parametrize("path", APIS)
async def test_a_blocked_answer_ends_as_its_api_ends_a_refusal(path: str) -> None:
    reply = saying(f"Before it. {CARD} and behind it, much more text.")
    async with guarded({**PII, "action": "block", "checks": "answer"}, reply=reply) as site:
        stream = await site.post(path, "x", stream=True)
        assert stream.status == 200
        assert ENDINGS[path](stream.data())
        assert "4111" not in stream.body.decode()
        assert "behind" not in stream.body.decode()
        assert stream.events()[-1][1] == "[DONE]" or path in (RESPONSES, MESSAGES)
        answer = (await site.post(path, "x")).json()
        if path == RESPONSES:
            assert (answer["status"], answer["output"]) == ("incomplete", [])
        elif path == MESSAGES:
            assert (answer["stop_reason"], answer["content"]) == ("refusal", [])
        else:
            assert answer["choices"][0]["finish_reason"] == "content_filter"
            assert not text_of(path, answer)
        await site.world.until_idle()
        assert await site.counts("pii", "answer") == {"blocked": 2}


async def test_a_blocked_stream_stops_the_engine() -> None:
    reply = saying("x" * 10 + f" {CARD} " + "y" * 3000)
    async with guarded({**PII, "action": "block", "checks": "answer"}, reply=reply) as site:
        await site.post(CHAT, "x", stream=True)
        await site.world.until_idle()
        found = await metrics(site.world)
        assert found["tandem_requests_total", "gen", CHAT, "200"] == 1


async def test_a_classifier_judges_windows_of_a_stream() -> None:
    guard = {**INJECTION, "checks": "answer", "window_chars": 20}
    text = "all is well here so far, and then a bad thing, which nobody may read"
    async with guarded(guard, reply=saying(text)) as site:
        stream = await site.post(CHAT, "x", stream=True)
        assert ENDINGS[CHAT](stream.data())
        passed = streamed_text(CHAT, stream.data())
        assert passed
        assert text.startswith(passed)
        assert "bad" not in passed


async def test_an_entity_across_two_windows_is_redacted() -> None:
    text = "one two three four Xaver Huber five six seven eight nine ten eleven"
    guard = {
        **{"name": "names", "classifier": "cls", "action": "redact", "checks": "answer"},
        "window_chars": 25,
    }
    async with guarded(guard, reply=saying(text), tasks=("token-classification",)) as site:
        stream = await site.post(CHAT, "x", stream=True)
        expected = text.replace("Xaver Huber", "[PER_1]")
        assert streamed_text(CHAT, stream.data()) == expected


async def test_a_stream_that_cannot_be_checked_ends_with_an_error() -> None:
    guard = {**INJECTION, "checks": "answer", "window_chars": 20}
    async with guarded(guard, reply=saying("word " * 20)) as site:
        site.classifier.fails = True
        stream = await site.post(CHAT, "x", stream=True)
        assert stream.data()[-1]["error"]["code"] == 503
        assert not streamed_text(CHAT, stream.data()[:-1])
        assert await site.counts("injection", "answer") == {"refused": 1}


async def test_texts_pass_while_the_engine_writes() -> None:
    async with guarded({**PII, "action": "redact"}, reply=lambda _: ["Hello ", "you"]) as site:
        site.generator.goes_on.clear()
        call = asgi.start(site.app, "POST", CHAT, request_for(CHAT, "x", stream=True))
        await site.world.until(lambda: b"Hello" in call.answer.body)
        site.generator.goes_on.set()
        assert streamed_text(CHAT, (await call.done()).data()) == "Hello you"


async def serve_bytes(
    site: Site, *chunks: bytes, content_type: bytes = b"text/event-stream"
) -> None:
    """Have the generator answer every request with these bytes."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", content_type)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    site.world.remove("gen", "gen-1")
    await site.world.serve(app, "gen", "gen-2", ROUTES)


def chunk_of(index: int = 0, reason: str | None = None, **delta: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    data = {"object": "chat.completion.chunk", "choices": [choice]}
    return f"data: {json.dumps(data)}\n\n".encode()


def call_of(arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}


def arguments_of(events: list[dict[str, Any]]) -> str:
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
    return "".join(call["function"]["arguments"] for call in calls)


async def test_arguments_of_tools_are_restored_as_json() -> None:
    async with guarded({**PII, "action": "redact", "checks": "prompt"}) as site:
        message = {
            "content": None,
            "tool_calls": [{"function": {"arguments": '{"to": "[EMAIL_1]"}'}}],
        }
        choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
        content = json.dumps({"choices": [choice]}).encode()
        await serve_bytes(site, content, content_type=b"application/json")
        answer = (await site.post(CHAT, MAIL)).json()
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"to": MAIL}


async def test_large_prompts_are_redacted_and_restored() -> None:
    async with guarded({**PII, "action": "redact", "checks": "prompt"}, reply=saying("x")) as site:
        answer = await site.post(CHAT, f"{MAIL} " + "word " * 80_000)
        assert answer.headers["x-tandem-guard"] == "pii=redacted"
        assert prompt_of(site.generator.bodies[0]).startswith("[EMAIL_1] word ")


ARGUMENTS = r'{"to": "x\n\tanna\u0040example.com", "card": 4111111111111111, "text": "[EMAIL_9]"}'


@pytest.mark.parametrize("action", ["redact", "block", "flag"])
async def test_streamed_arguments_of_tools_are_checked_without_their_escapes(action: str) -> None:
    async with guarded({**PII, "action": action, "checks": "answer"}) as site:
        chunks = [chunk_of(**call_of(part)) for part in parts(ARGUMENTS)]
        await serve_bytes(site, *chunks, chunk_of(reason="tool_calls"), b"data: [DONE]\n\n")
        stream = await site.post(CHAT, "x", stream=True)
        arguments = arguments_of(stream.data())
        if action == "redact":
            assert json.loads(arguments) == {
                "to": "x\n\t[EMAIL_1]",
                "card": "[CARD_1]",
                "text": "[EMAIL_9]",
            }
            assert stream.data()[-1]["choices"][0]["finish_reason"] == "tool_calls"
        elif action == "block":
            assert not arguments
            assert ENDINGS[CHAT](stream.data())
        else:
            assert arguments == ARGUMENTS
        outcome = {"redact": "redacted", "block": "blocked", "flag": "flagged"}[action]
        assert await site.counts("pii", "answer") == {outcome: 1}


async def test_arguments_in_prompts_are_read_and_redacted_as_json() -> None:
    async with guarded({**PII, "action": "redact", "checks": "prompt"}) as site:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
        body = request_for(CHAT, "x")
        body["messages"].insert(0, {"role": "assistant", "tool_calls": [call]})
        assert (await asgi.post(site.app, CHAT, body)).status == 200
        (call,) = site.generator.bodies[0]["messages"][0]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert arguments["to"] == "x\n\t[EMAIL_1]"
        assert arguments["card"] == "[CARD_1]"


@pytest.mark.parametrize(
    "fields",
    [
        {"documents": [{"id": MAIL, "name": "N", "source": "S"}]},
        {"documents": [{MAIL: 1}]},
        {"chat_template_kwargs": {"note": MAIL}},
        {"messages": [{"role": "user", "name": MAIL, "content": "x"}]},
    ],
)
async def test_every_text_of_a_prompt_is_checked(fields: dict[str, Any]) -> None:
    async with guarded({**PII, "action": "block", "checks": "prompt"}) as site:
        answer = await asgi.post(site.app, CHAT, {**request_for(CHAT, "x"), **fields})
        assert answer.json()["error"]["code"] == "content_filter"


async def test_prompts_that_hide_their_text_are_refused() -> None:
    hidden = (
        {"role": "a text", "content": "x"},
        {"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": "x"}]},
    )
    async with guarded({**PII, "action": "block", "checks": "prompt"}) as site:
        for message in hidden:
            answer = await asgi.post(site.app, CHAT, {"model": "gen", "messages": [message]})
            assert answer.status == 400
            assert answer.headers["x-tandem-guard"] == "pii=unreadable"
        assert not site.generator.bodies
        assert await site.counts("pii", "prompt") == {"unreadable": 2}


async def test_a_block_ends_every_open_choice() -> None:
    async with guarded({**PII, "action": "block", "checks": "answer"}) as site:
        await serve_bytes(
            site,
            *(chunk_of(0, content="one"), chunk_of(1, content="two")),
            *(chunk_of(0, reason="stop"), chunk_of(1, "stop", content=f" {MAIL}")),
        )
        stream = await site.post(CHAT, "x", stream=True)
        ends = {
            choice["index"]: choice["finish_reason"]
            for event in stream.data()
            for choice in event["choices"]
            if choice["finish_reason"]
        }
        assert ends == {0: "stop", 1: "content_filter"}
        assert "anna" not in stream.body.decode()


async def test_a_stream_without_a_last_event_is_checked_to_its_end() -> None:
    async with guarded({**PII, "action": "redact", "checks": "answer"}) as site:
        await serve_bytes(site, chunk_of(content=f"Hi {MAIL}"), chunk_of(content=MAIL)[:-20])
        stream = await site.post(CHAT, "x", stream=True)
        assert streamed_text(CHAT, stream.data()) == "Hi [EMAIL_1]"
        assert "anna" not in stream.body.decode()
        assert await site.counts("pii", "answer") == {"redacted": 1}


@pytest.mark.parametrize("action", ["block", "flag"])
async def test_answers_that_cannot_be_read_pass_only_guards_that_report(action: str) -> None:
    async with guarded({**PII, "action": action, "checks": "answer"}) as site:
        await serve_bytes(site, b"text", content_type=b"text/plain")
        answer = await site.post(CHAT, "x")
        assert answer.status == (200 if action == "flag" else 503)
        if action == "flag":
            assert answer.headers["x-tandem-guard"] == "pii=unreadable"


async def test_a_guard_that_only_reports_never_stops_an_answer() -> None:
    guard = {**INJECTION, "action": "flag", "checks": "answer", "window_chars": 20}
    async with guarded(guard, reply=saying("word " * 20)) as site:
        site.classifier.fails = True
        for stream in (False, True):
            assert (await site.post(CHAT, "x", stream=stream)).status == 200
        assert await site.counts("injection", "answer") == {"unchecked": 2}


async def test_a_reporting_classifier_gets_whole_words_with_context() -> None:
    guard = {**INJECTION, "action": "flag", "checks": "answer", "window_chars": 20}
    text = "one two three four five six seven eight nine ten eleven twelve"
    async with guarded(guard, reply=saying(text)) as site:
        await site.post(CHAT, "x", stream=True)
        words = text.split()
        seen = site.classifier.texts
        assert len(seen) > 2
        assert all(part.split()[-1] in words for part in seen)
        assert any(set(first.split()[-1:]) & set(then.split()) for first, then in pairwise(seen))


async def test_a_block_stops_the_engine_although_the_answer_could_be_repeated() -> None:
    def reply(_body: dict[str, Any]) -> list[str]:
        return [f"{MAIL} and", " more", " text"]

    async with guarded({**PII, "action": "block", "checks": "answer"}, reply=reply) as site:
        site.generator.goes_on.clear()
        body = request_for(CHAT, "x", stream=True)
        stream = await asgi.post(site.app, CHAT, body, headers={"idempotency-key": "k"})
        assert ENDINGS[CHAT](stream.data())
        await site.world.until(lambda: site.generator.cancelled == 1)


# -- keys, replays and changes --


def key_file(tmp_path: Any, *keys: dict[str, Any], tenants: dict[str, Any]) -> KeyFile:
    rows = [{"sha256": sha256(key.pop("key").encode()).hexdigest(), **key} for key in keys]
    path = tmp_path / "keys.yaml"
    path.write_text(json.dumps({"keys": rows, "tenants": tenants}))
    file = KeyFile(path, expected=True)
    file.refresh()
    return file


async def test_keys_and_tenants_choose_their_guards(tmp_path: Any) -> None:
    file = key_file(
        tmp_path,
        {"key": "plain", "tenant": "a"},
        {"key": "free", "tenant": "a", "guards": []},
        {"key": "strict", "tenant": "b"},
        {"key": "wrong", "tenant": "a", "guards": ["gone"]},
        tenants={"b": {"guards": ["pii", "extra"]}},
    )
    pii = {**PII, "action": "flag", "checks": "prompt"}
    extra = {"name": "extra", "patterns": ["card"], "action": "flag", "default": False}
    async with guarded(pii, extra, key_file=file) as site:

        async def header_of(key: str) -> str | None:
            body = request_for(CHAT, f"{MAIL} {CARD}")
            answer = await asgi.post(site.app, CHAT, body, headers={"x-api-key": key})
            assert answer.status == (503 if key == "wrong" else 200)
            return answer.headers.get("x-tandem-guard")

        assert await header_of("plain") == "pii=flagged"
        assert await header_of("free") is None
        assert await header_of("strict") == "pii=flagged, extra=flagged"
        assert await header_of("wrong") is None


async def test_a_client_can_ask_for_more_guards() -> None:
    guard = {**PII, "action": "block", "default": False}
    async with guarded(guard) as site:

        async def status_with(value: str) -> int:
            headers = {"x-tandem-guards": value}
            return (
                await asgi.post(site.app, CHAT, request_for(CHAT, MAIL), headers=headers)
            ).status

        assert (await site.post(CHAT, MAIL)).status == 200
        assert await status_with("pii") == 400
        assert await status_with(" , ") == 200
        assert await status_with("gone") == 400
        twice = {"x-tandem-guards": " ", "X-Tandem-Guards": "pii"}
        body = request_for(CHAT, MAIL)
        assert (await asgi.post(site.app, CHAT, body, headers=twice)).status == 400
        assert len(site.generator.bodies) == 2


async def test_a_repeated_request_gets_the_same_guarded_answer() -> None:
    async with guarded({**PII, "action": "redact"}) as site:
        headers = {"idempotency-key": "k"}
        body = request_for(CHAT, f"{MAIL} and {CARD}", stream=True)
        first = await asgi.post(site.app, CHAT, body, headers=headers)
        again = await asgi.post(site.app, CHAT, body, headers=headers)
        assert again.headers["idempotent-replayed"] == "true"
        assert streamed_text(CHAT, again.data()) == streamed_text(CHAT, first.data())
        assert len(site.generator.bodies) == 1


async def test_guards_follow_the_configuration() -> None:
    async with guarded() as site:
        assert text_of(CHAT, (await site.post(CHAT, MAIL)).json()) == MAIL
        world = site.world
        fields = {**world.config.model_dump(mode="json"), "guards": [{**PII, "action": "block"}]}
        world.gateway.reconfigure(parse(fields), None, needs_keys=False)
        assert (await site.post(CHAT, MAIL)).status == 400


async def test_guards_that_a_key_or_client_names_are_required_without_configured_ones(
    tmp_path: Any,
) -> None:
    file = key_file(
        *(
            tmp_path,
            {"key": "k", "tenant": "a", "guards": ["gone"]},
            {"key": "free", "tenant": "a"},
        ),
        tenants={},
    )
    async with guarded(key_file=file) as site:
        body = request_for(CHAT, "x")
        for headers, status in (
            ({"x-api-key": "k"}, 503),
            ({"x-api-key": "free"}, 200),
            ({"x-api-key": "free", "x-tandem-guards": "gone"}, 400),
        ):
            answer = await asgi.post(site.app, CHAT, body, headers=headers)
            assert answer.status == status, answer.body


async def test_texts_can_be_checked_without_a_generator(tmp_path: Any) -> None:
    file = key_file(tmp_path, {"key": "k", "tenant": "a"}, tenants={})
    other = {"name": "other", "patterns": ["iban"], "action": "block", "default": False}
    pii = {**PII, "action": "redact", "checks": "prompt"}
    async with guarded(pii, INJECTION, other, key_file=file) as site:

        async def check(**body: Any) -> asgi.Answer:
            return await asgi.post(site.app, "/v1/guards/test", body, headers={"x-api-key": "k"})

        answer = (await check(input=[f"Hi {MAIL}", "bad"])).json()
        first, second = answer["data"]
        assert (first["outcome"], first["text"]) == ("redacted", "Hi [EMAIL_1]")
        assert first["guards"][0]["found"] == [
            {"label": "EMAIL", "score": 1.0, "start": 3, "end": 3 + len(MAIL)}
        ]
        assert second["outcome"] == "blocked"
        assert (await check(input="x", guards=["other"])).json()["data"][0]["outcome"] == "passed"
        assert (await check(input="x", guards=["none"])).status == 400
        assert (await check(input=[])).status == 400
        assert (await check(input="x" * 1024 * 1024 + "y")).status == 413
        site.classifier.fails = True
        assert (await check(input="x")).json()["data"][0]["outcome"] == "refused"
