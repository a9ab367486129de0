"""Requests with tools in the formats of the three HTTP APIs, and what their answers contain."""

import json
from typing import Any

from tests import asgi
from tests.cluster.scripted_vllm import MODEL

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
Calls = list[tuple[str, Any]]


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
