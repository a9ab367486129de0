"""Tool calls and reasoning over vLLM's HTTP APIs, with models that follow a script."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cluster.engines.vllm.engine import VllmEngine
from cluster.errors import ConfigError
from tests import asgi
from tests.cluster.scripted_vllm import MODEL, ScriptedCore, scripted_engine, write_model
from tests.cluster.tool_requests import (
    ARGUMENTS,
    CALL,
    CHAT,
    MESSAGES,
    ONE,
    QUESTION,
    RESPONSES,
    SCHEMA,
    TIME_CALL,
    TWO,
    body,
    calls_of,
    end_of,
    text_of,
)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]

REASONING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}<|im_start|>assistant\n<think>\n"
)
Scripted = tuple[VllmEngine, ScriptedCore]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scripted]:
    """Start a model whose chat template ignores tools."""
    directory = tmp_path_factory.mktemp("plain")
    write_model(directory)
    async with scripted_engine(directory) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reasoning(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scripted]:
    """Start a model that begins each answer with its reasoning."""
    directory = tmp_path_factory.mktemp("reasoning")
    write_model(directory, REASONING_TEMPLATE, ["<think>", "</think>"])
    async with scripted_engine(directory) as started:
        yield started


STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
APIS = pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])


@STREAM
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
@APIS
async def test_tools_work_without_configuration(
    plain: Scripted, path: str, choice: str, stream: bool
) -> None:
    engine, core = plain
    core.script = lambda request: CALL
    answer = await asgi.post(engine.app, path, body(path, choice, stream=stream))
    assert calls_of(path, answer) == ONE
    # OpenAI ends a chat with a named function with "stop".
    ends = {CHAT: "stop" if choice == "named" else "tool_calls"}
    assert end_of(path, answer) == {RESPONSES: "completed", MESSAGES: "tool_use", **ends}[path]


@STREAM
@APIS
async def test_text_is_an_answer_to_optional_tools(
    plain: Scripted, path: str, stream: bool
) -> None:
    engine, core = plain
    core.script = lambda request: "It is sunny."
    answer = await asgi.post(engine.app, path, body(path, stream=stream))
    assert calls_of(path, answer) == []
    assert end_of(path, answer) in ("stop", "completed", "end_turn")
    assert b"sunny" in answer.body


@STREAM
@APIS
async def test_parallel_calls(plain: Scripted, path: str, stream: bool) -> None:
    engine, core = plain
    core.script = lambda request: f"{CALL}\n{TIME_CALL}"
    answer = await asgi.post(engine.app, path, body(path, stream=stream))
    assert calls_of(path, answer) == TWO


@STREAM
async def test_parallel_calls_can_be_turned_off(plain: Scripted, stream: bool) -> None:
    engine, core = plain
    core.script = lambda request: f"{CALL}\n{TIME_CALL}"
    request = body(CHAT, stream=stream, parallel_tool_calls=False)
    assert calls_of(CHAT, await asgi.post(engine.app, CHAT, request)) == ONE


@pytest.mark.parametrize("choice", ["required", "named"])
@APIS
async def test_demanded_calls_are_constrained_to_the_schema(
    plain: Scripted, path: str, choice: str
) -> None:
    engine, core = plain
    core.script = lambda request: CALL
    await asgi.post(engine.app, path, body(path, choice))
    sent = core.requests[-1].sampling_params.structured_outputs
    tags = json.loads(sent.structural_tag)["format"]["tags"]
    schemas = [tag["content"]["json_schema"] for tag in tags if "weather" in tag["begin"]]
    assert schemas
    assert all(schema == SCHEMA for schema in schemas)
    assert all(tag["content"]["max_whitespace_cnt"] == 1 for tag in tags)


async def test_calls_and_results_reach_the_model(plain: Scripted) -> None:
    engine, core = plain
    core.script = lambda request: "Sunny."
    call = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    history = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call-1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "21 degrees"},
    ]
    answer = await asgi.post(engine.app, CHAT, body(CHAT, messages=history))
    assert answer.json()["choices"][0]["message"]["content"] == "Sunny."
    prompt = core.prompt_of(core.requests[-1])
    places = [prompt.index(text) for text in ('"name": "time"', QUESTION, "Zürich", "21 degrees")]
    assert places == sorted(places)


async def test_a_prompt_without_tools_is_unchanged(plain: Scripted) -> None:
    engine, core = plain
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    assert (await asgi.post(engine.app, CHAT, request)).status == 200
    assert core.prompt_of(core.requests[-1]).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_the_parsers_are_listed_with_the_model(plain: Scripted, reasoning: Scripted) -> None:
    for (engine, _), expected in (
        (plain, ("hermes", None)),
        (reasoning, ("hermes", "deepseek_r1")),
    ):
        (card,) = (await asgi.get(engine.app, "/v1/models")).json()["data"]
        assert (card["tool_call_parser"], card["reasoning_parser"]) == expected


# -- reasoning -------------------------------------------------------------------------------------


@STREAM
@APIS
async def test_reasoning_is_separated_from_the_answer(
    reasoning: Scripted, path: str, stream: bool
) -> None:
    engine, core = reasoning
    core.script = lambda request: "Two and two.</think>Four."
    request = body(path, stream=stream)
    del request["tools"], request["tool_choice"]
    answer = await asgi.post(engine.app, path, request)
    assert text_of(path, answer) == ("Two and two.", "Four.")


@STREAM
@APIS
async def test_calls_follow_reasoning(reasoning: Scripted, path: str, stream: bool) -> None:
    engine, core = reasoning
    core.script = lambda request: f"I need a tool.</think>\n\n{CALL}"
    answer = await asgi.post(engine.app, path, body(path, stream=stream))
    assert calls_of(path, answer) == ONE
    assert text_of(path, answer)[0] == "I need a tool."


# -- configuration ---------------------------------------------------------------------------------


async def test_the_configuration_turns_parsers_off(tmp_path: Path) -> None:
    write_model(tmp_path, REASONING_TEMPLATE, ["<think>", "</think>"])
    off = {"tool_call_parser": "none", "reasoning_parser": "none"}
    async with scripted_engine(tmp_path, **off) as (engine, core):
        core.script = lambda request: "Hm.</think>Yes."
        assert (await asgi.post(engine.app, CHAT, body(CHAT))).status == 400
        request = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]}
        answer = await asgi.post(engine.app, CHAT, request)
        assert answer.json()["choices"][0]["message"]["content"] == "Hm.</think>Yes."


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_call_parser": "hermse"}, "tool_call_parser: vLLM has no parser 'hermse'.*'hermes'"),
        ({"reasoning_parser": "deepseek_r1"}, "deepseek_r1 cannot be used with the tokenizer"),
    ],
)
async def test_a_parser_that_cannot_work_is_a_configuration_error(
    tmp_path: Path, fields: dict[str, str], reason: str
) -> None:
    write_model(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        async with scripted_engine(tmp_path, **fields):
            pass


async def test_parsers_in_engine_args_still_work(tmp_path: Path) -> None:
    write_model(tmp_path)
    given = {"enable_auto_tool_choice": True, "tool_call_parser": "pythonic"}
    async with scripted_engine(tmp_path, engine_args=given) as (engine, _):
        (card,) = (await asgi.get(engine.app, "/v1/models")).json()["data"]
        assert card["tool_call_parser"] == "pythonic"


async def test_a_parser_that_lacks_its_tokens_is_not_chosen(tmp_path: Path) -> None:
    write_model(tmp_path, REASONING_TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]"))
    async with scripted_engine(tmp_path) as (engine, _):
        (card,) = (await asgi.get(engine.app, "/v1/models")).json()["data"]
        assert (card["tool_call_parser"], card["reasoning_parser"]) == ("hermes", None)
