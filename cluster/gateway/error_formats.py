"""Errors in the format of the API that a request uses: OpenAI's or Anthropic's.

Complete error responses and the last event of a stream that breaks both use it, so that the
vendors' clients raise their own exceptions.
"""

import json
from collections.abc import Mapping
from typing import Any

from cluster.engines.dead import ERROR_EVENTS
from cluster.errors import RequestError, request_error_for

_MESSAGES = "/v1/messages"
_RESPONSES = "/v1/responses"
# Streams of events `data: <chunk>`, whose clients recognize a chunk with the field `error`.
_CHUNK_STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/audio/", "/inference/v1/generate")

_ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_ANTHROPIC_STATUSES = {kind: status for status, kind in _ANTHROPIC_TYPES.items() if status != 529}


def error_body(path: str, error: RequestError) -> dict[str, Any]:
    """Return the JSON body of an error response in the format of the API at ``path``."""
    if not path.startswith(_MESSAGES):
        return error.body()
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(error.status, kind)
    fields = {"type": kind, "message": error.message}
    return {"type": "error", "error": {**error.body()["error"], **fields}}


def error_event(path: str, error: RequestError) -> bytes | None:
    """Return the event that ends a broken stream, or None if the stream's format is unknown."""
    body = error_body(path, error)
    if path.startswith(_MESSAGES):
        return _event("error", body)
    if path.startswith(_RESPONSES):
        # The documented fields of this event are at the top. OpenAI's client raises an error only
        # for the field `error`, which OpenAI's servers send, too.
        top = {"type": "error", "code": error.type, "message": error.message, "param": error.param}
        return _event("error", {**top, "sequence_number": 0, **body})
    if path.startswith(_CHUNK_STREAMS):
        return _event(None, body)
    return None


def first_event_error(chunk: bytes) -> RequestError | None:
    """Return the error in a stream's first event, or None if that event is not an error."""
    if not chunk.startswith(ERROR_EVENTS):
        return None
    event = chunk.partition(b"\n\n")[0]
    data = b"".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:"))
    try:
        error = json.loads(data)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    status = error.get("code")
    if not isinstance(status, int):
        status = _ANTHROPIC_STATUSES.get(error.get("type"), 500)
    return request_error_for(status, message, param)


def _event(name: str | None, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + b"data: " + data.encode() + b"\n\n"
