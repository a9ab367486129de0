"""Malformed requests to every API, and a check of the answers."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.errors import MAX_MESSAGE_CHARS, ContextLengthError

MODEL = "smollm2"
USER = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": USER, "max_tokens": 2},
    COMPLETIONS: {"model": MODEL, "prompt": "Hi", "max_tokens": 2},
    RESPONSES: {"model": MODEL, "input": "Hi", "max_output_tokens": 2},
    MESSAGES: {"model": MODEL, "messages": USER, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": USER},
    "/v1/responses/input_tokens": {"model": MODEL, "input": "Hi"},
    "/tokenize": {"model": MODEL, "prompt": "Hi"},
    "/detokenize": {"model": MODEL, "tokens": [5]},
    "/classify": {"model": "sentiment", "input": "good"},
    "/v1/embeddings": {"model": "sentiment", "input": "good"},
}
HUGE = "x" * 200_000
MAX_BYTES = 4 * MAX_MESSAGE_CHARS
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 0.5, "x", HUGE, [], [1], [[]], {}, {"x": []}, 10**40)
STRUCTURED_OUTPUTS: tuple[Any, ...] = (
    {"regex": "[a-"},
    {"regex": "a{2,1}"},
    {"regex": "(?<=a)b"},
    {"json": {"type": "nope"}},
    {"json": "{"},
    {"json": {"$ref": "#/nowhere"}},
    {"json": {"type": "string", "pattern": "[a-"}},
    {"json": {"type": "integer", "minimum": 5, "maximum": 3}},
    {"grammar": "root ::= ("},
    {"grammar": "root ::= other"},
    {"grammar": "start: /[a-/"},
    {"choice": []},
    {"choice": [1]},
    {"structural_tag": "{"},
    {"structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "nope"}})},
    {"regex": "a", "choice": ["b"]},
    {"unknown": 1},
    "regex",
)
UNMATCHABLE = {"grammar": 'root ::= root "a"'}
"""A structured output that compiles, but that no text matches."""


def problem_of(path: str, status: int, headers: Mapping[str, str], content: bytes) -> str | None:
    """Return what is wrong with the answer to a malformed request, or None."""
    shown = f"{status}: {content[:300]!r}"
    if status == 200:  # what is malformed was ignored
        return None
    if not 400 <= status < 500 or len(content) > MAX_BYTES:
        return f"{len(content)} bytes, {shown}"
    try:
        body = json.loads(content)
        error = body["error"]
        is_formatted = isinstance(error["message"], str) and error["message"] != ""
        if path.startswith(MESSAGES):
            is_formatted &= body["type"] == "error" and error["type"].islower()
            is_formatted &= "request-id" in headers
        else:
            is_formatted &= error["code"] in (status, ContextLengthError.code)
    except (ValueError, KeyError, TypeError):
        is_formatted = False
    return None if is_formatted else shown


def malformed(path: str, model: str) -> Iterator[tuple[str, bytes, int | None]]:
    """Yield name, body, and the expected status if it is the same on every path."""
    fields = {**BODIES[path], "model": model}
    good = json.dumps(fields).encode()

    def with_field(field: bytes) -> bytes:
        return good[:-1] + b"," + field + b"}"

    yield "no body", b"", None
    yield "truncated", good[:-1], 400
    yield "list", b"[1]", 400
    yield "null", b"null", 400
    # Classifiers do not read the values of fields that they do not know.
    unread = None if BODIES[path]["model"] == "sentiment" else 400
    yield "not UTF-8", with_field(b'"x":"\xff"'), unread
    yield "UTF-16", good.decode().encode("utf-16"), 400
    yield "lone surrogate", with_field(b'"user":"\\ud800"'), 400
    yield "3000 levels", with_field(b'"x":' + b"[" * 3000 + b"]" * 3000), 400
    yield "100 levels", with_field(b'"x":' + b"[" * 100 + b"]" * 100), None
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"):
        for name in (b"temperature", b"x", b"logit_bias"):
            value = b'{"5":' + number + b"}" if name == b"logit_bias" else number
            status = unread if b"999" in number else 400
            yield f"{name!r} {number!r}", with_field(b'"' + name + b'":' + value), status
    yield "5000 digits", with_field(b'"seed":' + b"9" * 5000), None
    yield "unknown model", json.dumps({**fields, "model": HUGE}).encode(), 404
    yield "model is a number", json.dumps({**fields, "model": 3}).encode(), 400
    yield "long unknown field", json.dumps({**fields, HUGE: 1}).encode(), None
    names = {*fields, "stream", "tools", "response_format", "structured_outputs"} - {"model"}
    for field in sorted(names):
        for value in ODD_VALUES:
            body = json.dumps({**fields, field: value}).encode()
            yield f"{field} = {str(value)[:20]}", body, None
