"""Tool calls and reasoning over vLLM's HTTP APIs, with models that follow a script."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cluster.engines.vllm.engine import VllmEngine
from cluster.errors import ConfigError
from tests import asgi
from tests.cluster.scripted_vllm import MODEL, ScriptedCore, scripted_engine, write_model

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # vLLM's imports warn
]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
ARGUMENTS = {"city": "Zürich", "days": 2}
CALL = f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': ARGUMENTS})}\n</tool_call>"
TIME_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ONE, TWO = [("weather", ARGUMENTS)], [("weather", ARGUMENTS), ("time", {})]
QUESTION = "How is the weather?"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
CHOICES = {
    CHAT: {
        "auto": "auto",
        "required": "required",
        "named": {"type": "function", "function": {"name": "weather"}},
    },
    RESPONSES: {
        "auto": "auto",
        "required": "required",
        "named": {"type": "function", "name": "weather"},
    },
    MESSAGES: {
        "auto": {"type": "auto"},
        "required": {"type": "any"},
        "named": {"type": "tool", "name": "weather"},
    },
}
REASONING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}<|im_start|>assistant\n<think>\n"
)
Calls = list[tuple[str, Any]]
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


def body(path: str, choice: str = "auto", **fields: Any) -> dict[str, Any]:
    """Return a request with two tools in the format of the API."""
    tools: list[dict[str, Any]] = []
    for name, schema in {"weather": SCHEMA, "time": {"type": "object", "properties": {}}}.items():
        tool = {"name": name, "description": f"Tell the {name}"}
        if path == MESSAGES:
            tools.append({**tool, "input_schema": schema})
        elif path == RESPONSES:
            tools.append({"type": "function", **tool, "parameters": schema})
        else:
            tools.append({"type": "function", "function": {**tool, "parameters": schema}})
    asked = [{"role": "user", "content": QUESTION}]
    prompt = {"input": QUESTION} if path == RESPONSES else {"messages": asked}
    limit = {"max_tokens": 500} if path == MESSAGES else {}
    choices = CHOICES[path][choice]
    return {"model": MODEL, "tools": tools, "tool_choice": choices, **prompt, **limit, **fields}


def calls_of(path: str, answer: asgi.Answer) -> Calls:
    """Return name and parsed arguments of each call in an answer, streamed or not."""
    assert answer.status == 200, answer.body
    if answer.headers["content-type"].startswith("text/event-stream"):
        return _streamed_calls(path, answer.data())
    found = answer.json()
    if path == CHAT:
        calls = [call["function"] for call in found["choices"][0]["message"].get("tool_calls", ())]
    else:
        items = found["output" if path == RESPONSES else "content"]
        calls = [item for item in items if item["type"] in ("function_call", "tool_use")]
    return [
        (call["name"], call["input"] if path == MESSAGES else json.loads(call["arguments"]))
        for call in calls
    ]


def _streamed_calls(path: str, events: list[Any]) -> Calls:
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for index, name, piece in _pieces(path, events):
        names.setdefault(index, name)
        arguments[index] = arguments.get(index, "") + piece
    return [(name, json.loads(arguments[index] or "{}")) for index, name in names.items()]


def _pieces(path: str, events: list[Any]) -> list[tuple[int, str, str]]:
    """Return index, name (empty after the first piece) and a piece of the arguments."""
    if path == CHAT:
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
        return [
            (call["index"], call["function"].get("name", ""), call["function"].get("arguments", ""))
            for call in calls
        ]
    index, added, block = (
        ("output_index", "response.output_item.added", "item")
        if path == RESPONSES
        else ("index", "content_block_start", "content_block")
    )
    found = []
    for event in events:
        if event["type"] == added and "name" in event[block]:
            found.append((event[index], event[block]["name"], ""))
        elif event["type"] == "response.function_call_arguments.delta":
            found.append((event[index], "", event["delta"]))
        elif path == MESSAGES and event.get("delta", {}).get("type") == "input_json_delta":
            found.append((event[index], "", event["delta"]["partial_json"]))
    return found


def end_of(path: str, answer: asgi.Answer) -> str:
    """Return the finish reason, or what takes its place."""
    data = answer.data() if answer.events() else [answer.json()]
    if path == CHAT:
        return str(data[-1]["choices"][0]["finish_reason"])
    if path == MESSAGES:
        ends = [event.get("delta", event) for event in data]
        return str(next(end["stop_reason"] for end in ends if end.get("stop_reason")))
    return str(data[-1].get("response", data[-1])["status"])


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


def text_of(path: str, answer: asgi.Answer) -> tuple[str, str]:
    """Return reasoning and text of an answer, streamed or not."""
    assert answer.status == 200, answer.body
    if not answer.events():
        found = answer.json()
        if path == CHAT:
            message = found["choices"][0]["message"]
            return message["reasoning"] or "", message["content"] or ""
        if path == MESSAGES:
            parts = {item["type"]: item for item in found["content"]}
            return parts["thinking"]["thinking"], parts.get("text", {}).get("text", "")
        parts = {
            item["type"]: item["content"][0]["text"]
            for item in found["output"]
            if "content" in item
        }
        return parts["reasoning"], parts.get("message", "")
    texts = {"reasoning": "", "content": ""}
    for event in answer.data():
        if path == CHAT:
            for choice in event["choices"]:
                for kind in texts:
                    texts[kind] += choice["delta"].get(kind) or ""
        elif path == MESSAGES:
            texts["reasoning"] += event.get("delta", {}).get("thinking", "")
            texts["content"] += event.get("delta", {}).get("text", "")
        elif event["type"] == "response.reasoning_text.delta":
            texts["reasoning"] += event["delta"]
        elif event["type"] == "response.output_text.delta":
            texts["content"] += event["delta"]
    return texts["reasoning"], texts["content"]


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


async def test_an_unknown_parser_is_a_configuration_error(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(
        ConfigError, match=r"tool_call_parser: vLLM has no parser 'hermse'.*'hermes'"
    ):
        async with scripted_engine(tmp_path, tool_call_parser="hermse"):
            pass


async def test_a_parser_that_lacks_its_tokens_is_not_chosen(tmp_path: Path) -> None:
    write_model(tmp_path, REASONING_TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]"))
    async with scripted_engine(tmp_path) as (engine, _):
        (card,) = (await asgi.get(engine.app, "/v1/models")).json()["data"]
        assert (card["tool_call_parser"], card["reasoning_parser"]) == ("hermes", None)
