"""Malformed requests to vLLM's real frontend behind the gateway, without a model."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from cluster.engines.vllm import internals
from cluster.engines.vllm.inputs import ReadJson, reject_uncompiled
from cluster.engines.vllm.routes import INPUT_TOKENS_PATH
from cluster.errors import InvalidRequestError
from tests import asgi
from tests.cluster.malformed import (
    BODIES,
    CHAT,
    COMPLETIONS,
    MESSAGES,
    ODD_VALUES,
    RESPONSES,
    STRUCTURED_OUTPUTS,
    malformed,
    problem_of,
)
from tests.cluster.scripted_vllm import scripted_engine, write_model
from tests.serve.gateway_kit import World, gateway_world

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]
GENERATOR_PATHS = [path for path, body in BODIES.items() if body["model"] != "sentiment"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Start a router with vLLM's frontend."""
    directory: Path = tmp_path_factory.mktemp("model")
    write_model(directory)
    async with (
        scripted_engine(directory, name="gen") as (engine, core),
        gateway_world() as world,
    ):
        core.script = lambda request: "Hi"
        await world.serve(engine.app, "gen", "gen-1", engine.routes())
        yield world


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    return {**BODIES[path], "model": "gen", **fields}


def problem(path: str, answer: asgi.Answer) -> str | None:
    return problem_of(path, answer.status, answer.headers, answer.body)


@pytest.mark.parametrize("path", GENERATOR_PATHS)
async def test_malformed_bodies(world: World, path: str) -> None:
    problems = []
    for name, body, status in malformed(path, "gen"):
        answer = await asgi.post(world.app, path, body)
        found = problem(path, answer)
        if found is None and status not in (None, answer.status):
            found = f"{answer.status} instead of {status}: {answer.body[:200]!r}"
        if found is not None:
            problems.append(f"{name}: {found}")
    assert not problems, "\n".join(problems)
    assert (await asgi.post(world.app, path, body_of(path))).status == 200


FIELDS = (
    *("structured_outputs", "response_format", "tools", "tool_choice", "stream_options", "stop"),
    *("logit_bias", "messages", "prompt", "input", "n", "top_logprobs", "user"),
    *("functions", "chat_template_kwargs", "documents", "prompt_logprobs", "stream", "system"),
    *("reasoning", "text", "include", "metadata", "previous_response_id", "truncation", "thinking"),
    *("prompt_embeds", "echo", "suffix", "bad_words", "allowed_token_ids", "vllm_xargs", "seed"),
    *("kv_transfer_params", "cache_salt", "stop_token_ids", "reasoning_effort", "modalities"),
    *("instructions", "tool_resources", "context_management", "output_config", "stop_sequences"),
)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
async def test_no_value_of_a_field_causes_an_error_of_the_server(world: World, path: str) -> None:
    problems = {}
    for field in FIELDS:
        for value in ODD_VALUES:
            answer = await asgi.post(world.app, path, body_of(path, **{field: value}))
            if found := problem(path, answer):
                problems[field, str(value)[:20]] = found
    assert not problems


@pytest.mark.parametrize("path", [RESPONSES, INPUT_TOKENS_PATH])
async def test_items_that_vllm_cannot_render_are_rejected(world: World, path: str) -> None:
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    refusal = {**message, "content": [{"type": "refusal", "refusal": "No."}]}
    answer = await asgi.post(world.app, path, body_of(path, input=[refusal]))
    assert answer.status == 400, answer.body
    assert problem(path, answer) is None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
async def test_structured_outputs_that_cannot_be_compiled(world: World, path: str) -> None:
    problems = {}
    for wanted in STRUCTURED_OUTPUTS:
        answer = await asgi.post(world.app, path, body_of(path, structured_outputs=wanted))
        if answer.status != 400 or problem(path, answer):
            problems[str(wanted)] = answer.body[:300]
    assert not problems


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, INPUT_TOKENS_PATH])
@pytest.mark.parametrize("num_words", [2048, 4000, 20_000])
async def test_a_prompt_over_the_context_has_openais_code(
    world: World, path: str, num_words: int
) -> None:
    field = {CHAT: "messages", MESSAGES: "messages", COMPLETIONS: "prompt"}.get(path, "input")
    text = "word " * num_words
    value = [{"role": "user", "content": text}] if field == "messages" else text
    answer = await asgi.post(world.app, path, body_of(path, **{field: value}))
    assert answer.status == 400, answer.body
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert ("prompt is too long" in answer.json()["error"]["message"]) == (path == MESSAGES)


async def test_nulls_of_messages_are_not_left_out(world: World) -> None:
    answer = await asgi.post(world.app, MESSAGES, body_of(MESSAGES))
    assert answer.json()["stop_sequence"] is None
    assert answer.json()["stop_reason"] in ("end_turn", "max_tokens")
    assert "kv_transfer_params" not in answer.json()
    assert answer.headers["request-id"]


async def test_input_tokens_of_a_response_are_counted(world: World) -> None:
    body = body_of(RESPONSES, input="What is the capital of France?")
    answer = await asgi.post(world.app, INPUT_TOKENS_PATH, body)
    used = (await asgi.post(world.app, RESPONSES, body)).json()["usage"]["input_tokens"]
    assert answer.json() == {"object": "response.input_tokens", "input_tokens": used}
    document = (await asgi.get(world.app, "/openapi.json")).json()
    assert "InputTokens" in str(document["paths"][INPUT_TOKENS_PATH])


@pytest.mark.parametrize(
    "body",
    [
        b'{"x":1e999}',
        b'{"x":[-1e999]}',
        b'{"x":NaN}',
        b'{"x":"\xff"}',
        b'{"x":"\\ud800"}',
        b"[" * 5000,
        "{}".encode("utf-16"),
    ],
)
async def test_json_that_only_python_accepts_is_rejected(body: bytes) -> None:
    async def app(*_: Any) -> None:
        raise AssertionError("reached")

    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        await asgi.post(ReadJson(app), "/v1/completions", body)


async def test_other_bodies_are_passed_on() -> None:
    seen: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["body"])

    for body, content_type in ((b'{"x":1}', "application/json"), (b"\xff", "audio/wav"), (b"", "")):
        headers = {"content-type": content_type}
        await asgi.post(ReadJson(app), "/v1/completions", body, headers=headers)
    assert seen == [b'{"x":1}', b"\xff", b""]


async def test_schemas_of_hugging_faces_client_are_read(world: World) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(json.loads((await receive())["body"])["response_format"])

    schema = {"type": "object"}
    for wanted in ({"type": "json_object", "value": schema}, {"type": "json_object"}):
        await asgi.post(ReadJson(app), CHAT, {"response_format": wanted})
    described = {"name": "answer", "schema": schema}
    assert seen == [{"type": "json_schema", "json_schema": described}, {"type": "json_object"}]
    wrong = body_of(CHAT, response_format={"type": "json_object", "value": {"type": "nope"}})
    assert (await asgi.post(world.app, CHAT, wrong)).status == 400


async def test_a_structured_output_that_does_not_compile_raises_400() -> None:
    def output(finish_reason: str | None, *token_ids: int) -> Any:
        completion = SimpleNamespace(token_ids=token_ids, finish_reason=finish_reason)
        return SimpleNamespace(outputs=[completion])

    async def run(outputs: list[Any], structured: Any) -> int:
        async def generate(prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
            for item in outputs:
                yield item

        wanted = structured and SimpleNamespace(json=None, structural_tag=None, **structured)
        params = SimpleNamespace(structured_outputs=wanted)
        return len([item async for item in reject_uncompiled(generate)("", params)])

    with pytest.raises(internals.VLLMValidationError, match="cannot compile"):
        await run([output("error")], {"regex": "a"})
    with pytest.raises(internals.VLLMValidationError, match="no text matches"):
        await run([output(None), output("error", 5)], {"grammar": 'root ::= root "a"'})
    assert await run([output(None, 5), output("error")], {"regex": "a"}) == 2
    assert await run([output("error")], None) == 1
    assert await run([output("stop", 5)], {"regex": "a"}) == 1


def schema_of(*patterns: str) -> dict[str, Any]:
    fields = {f"f{index}": {"type": "string", "pattern": p} for index, p in enumerate(patterns)}
    return {"type": "object", "properties": fields, "required": list(fields)}


@pytest.mark.parametrize(
    "schema",
    [
        schema_of("^.{1,20000}$"),
        schema_of("^[a-z]{501}$"),
        schema_of("^x{400,}y{400,}$"),
        schema_of("^x{400}$", "^x{400}$"),
        schema_of("^((.{1,30}){1,30}){1,30}$"),
        schema_of("^([a-z(\\]{]{9}){1,600}$"),
        {"type": "object", "patternProperties": {"^.{1,20000}$": {"type": "string"}}},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": schema_of("x{99999999999}")}]},
    ],
)
async def test_patterns_that_would_block_the_replica_are_400(world: World, schema: Any) -> None:
    named = {"name": "s", "schema": schema}
    function = {"name": "f", "parameters": schema}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"structured_outputs": {"json": schema}},
        {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
    ):
        answer = await asgi.post(world.app, CHAT, body_of(CHAT, **fields))
        assert answer.status == 400, fields
        assert "`maxLength`" in answer.json()["error"]["message"]


async def test_usual_patterns_are_accepted(world: World) -> None:
    schema = schema_of("^.{1,400}$", "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    schema["properties"]["pattern"] = {"type": "string", "maxLength": 10_000}
    named = {"name": "s", "schema": schema}
    fields = {"response_format": {"type": "json_schema", "json_schema": named}}
    assert (await asgi.post(world.app, CHAT, body_of(CHAT, **fields))).status == 200
