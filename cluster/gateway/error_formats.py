"""Errors in the format of the API that a request uses: OpenAI's or Anthropic's.

Complete error responses and the last event of a stream that breaks both use it, so that the
vendors' clients raise their own exceptions.
"""

import json
from collections.abc import Mapping
from http.client import responses
from typing import Any

from cluster.config.applications import KNOWLEDGE_PATH, TASK_PREFIX
from cluster.engines.dead import ERROR_EVENTS
from cluster.errors import ContextLengthError, RequestError, request_error_for

_MESSAGES = "/v1/messages"
_RESPONSES = "/v1/responses"
# Streams of events `data: <chunk>`, whose clients recognize a chunk with the field `error`.
_CHUNK_STREAMS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/audio/",
    "/inference/v1/generate",
)
# The same, but `[DONE]` is promised after an error, too.
_APPLICATION_STREAMS = (TASK_PREFIX, KNOWLEDGE_PATH)
_DONE = b"data: [DONE]\n\n"

_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_ANTHROPIC_STATUSES = {kind: status for status, kind in _ANTHROPIC_TYPES.items() if status != 529}


def is_anthropic(path: str) -> bool:
    """Return True if a path belongs to Anthropic's API."""
    return path.startswith(_MESSAGES)


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """Return the JSON body of an error response in the format of the API at ``path``."""
    if not is_anthropic(path):
        return error.body()
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, kind)
    message = error.message
    if isinstance(error, ContextLengthError):
        message = f"prompt is too long: {message}"  # clients recognize Anthropic's words
    fields = {"type": kind, "message": message}
    return {"type": "error", "error": {**error.body()["error"], **fields}}


def error_events(
    path: str, error: RequestError, first: bytes = b"", last: bytes = b""
) -> bytes | None:
    """Return the events that end a broken stream, or None if the stream's format is unknown.

    Args:
        path: The request's path.
        error: Reason for the end.
        first: The stream's first chunk.
        last: Its last chunk.
    """
    body = error_body(path, error)
    if is_anthropic(path):
        return _event("error", body)
    if path.startswith(_RESPONSES):
        return _failed_response(error, body, first, last)
    if path.startswith(_CHUNK_STREAMS):
        return _event(None, body)
    if path.startswith(_APPLICATION_STREAMS):
        return _event(None, body) + _DONE
    return None


def _failed_response(
    error: RequestError, body: Mapping[str, Any], first: bytes, last: bytes
) -> bytes:
    """Return `response.failed`, which OpenAI documents, and `error`.

    OpenAI's client raises an error only for an event with the field `error`, which OpenAI's servers
    send, too.
    """
    number = _event_data(last.rstrip(b"\n").rpartition(b"\n\n")[2]).get("sequence_number")
    number = number if isinstance(number, int) else -1
    events = b""
    response = _event_data(first.partition(b"\n\n")[0]).get("response")  # of `response.created`
    if isinstance(response, dict):
        number += 1
        failure = {"code": "server_error", "message": error.message}
        failed = {**response, "status": "failed", "error": failure}
        fields = {"type": "response.failed", "sequence_number": number, "response": failed}
        events = _event("response.failed", fields)
    top = {"type": "error", "code": error.type, "message": error.message, "param": error.param}
    return events + _event("error", {**top, "sequence_number": number + 1, **body})


def engine_error_body(path: str, status: int, content: bytes) -> bytes:
    """Return the body of an engine's error response in the format of the API at ``path``.

    vLLM and Starlette have several formats, and quote what the client sent at any length.
    """
    error: Any = None
    try:
        body = json.loads(content)
        error = body.get("error", body.get("detail", body))
    except (ValueError, AttributeError, RecursionError):
        body = content.decode(errors="replace")
    fields = error if isinstance(error, dict) else {}
    message = fields.get("message") or error or body or responses.get(status, f"Status {status}")
    param = fields.get("param")
    param = None if param is None else str(param)
    known = request_error_for(status, str(message), param, fields.get("code"))
    formatted = error_body(path, known)
    formatted["error"]["code"] = known.code or status
    return json.dumps(formatted, ensure_ascii=False, separators=(",", ":")).encode()


def first_event_error(chunk: bytes) -> RequestError | None:
    """Return the error in a stream's first event, or None if that event is not an error."""
    if not chunk.startswith(ERROR_EVENTS):
        return None
    try:
        error = _event_data(chunk.partition(b"\n\n")[0])["error"]
        message, param = str(error["message"]), error.get("param")
    except (KeyError, TypeError, AttributeError):
        return None
    status = error.get("code")
    if not isinstance(status, int):
        status = _ANTHROPIC_STATUSES.get(error.get("type"), 500)
    return request_error_for(status, message, param)


def _event_data(event: bytes) -> dict[str, Any]:
    """Return the data of a server-sent event; empty if that is no JSON object."""
    data = b"".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:"))
    try:
        fields = json.loads(data)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _event(name: str | None, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + data.encode() + b"\n\n"
