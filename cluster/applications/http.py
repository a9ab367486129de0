"""HTTP of the applications: bodies of requests, results, streams, errors.

A stream has server-sent events with a JSON object each: ``{"delta": "…"}`` for a piece of text,
``{"result": {…}}`` at the end, then ``[DONE]``; or ``{"error": {…}}`` if the work fails after its
first piece. Before it, an error is the status of the response.
"""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.asgi import Send
from cluster.engines.json_body import decode_json
from cluster.errors import (
    InternalError,
    InvalidRequestError,
    PayloadTooLargeError,
    RequestError,
)
from cluster.tasks import TaskResult

logger = logging.getLogger("ray.serve.tandem")

B = TypeVar("B", bound=BaseModel)

_DONE = b"data: [DONE]\n\n"
_MAX_CHAR_BYTES = 12
_OTHER_BYTES = 1024 * 1024  # of a body that are not its texts


class Reply:
    """Response to one request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_streaming = False

    async def send_json(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        await self._send_bytes(status, content, headers)

    async def send_result(self, items: AsyncIterator[str | TaskResult]) -> None:
        async for item in items:
            if isinstance(item, TaskResult):
                await self.send_model(item)

    async def send_model(self, result: BaseModel) -> None:
        await self._send_bytes(200, _encode(result))

    async def stream(self, items: AsyncIterator[str | TaskResult]) -> None:
        async for item in items:
            if not self._is_streaming:  # not before: an error can still become the status
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                self._is_streaming = True
            if isinstance(item, TaskResult):
                await self._write(b'data: {"result":' + _encode(item) + b"}\n\n")
            else:
                await self._write_event({"delta": item})
        await self._write(_DONE, more=False)

    async def fail(self, error: RequestError) -> None:
        if not self._is_streaming:
            await self.send_json(error.status, error.body(), error.headers())
            return
        await self._write_event(error.body())
        await self._write(_DONE, more=False)

    async def _write_event(self, fields: Mapping[str, Any]) -> None:
        data = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        await self._write(b"data: " + data.encode() + b"\n\n")

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _send_bytes(
        self, status: int, content: bytes, more: Mapping[str, str] | None = None
    ) -> None:
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            *((name.encode(), value.encode()) for name, value in (more or {}).items()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._write(content, more=False)


def _encode(result: BaseModel) -> bytes:
    return result.model_dump_json().encode()


Answer = Callable[[Reply], Awaitable[None]]
"""Answers one request; its errors become the answer."""


async def respond(path: str, send: Send, answer: Answer) -> None:
    """Answer a request; errors become the status, or the last event of a stream."""
    reply = Reply(send)
    try:
        await answer(reply)
    except RequestError as error:
        await reply.fail(error)
    except Exception:
        logger.exception("%s failed", path)
        await reply.fail(InternalError("The request failed; the replica's log has the traceback."))


def parse_body(model: type[B], body: bytes, max_chars: int) -> B:
    """Return the request in a body.

    Raises:
        InvalidRequestError: It is not JSON, or a field is missing, unknown or wrong.
        PayloadTooLargeError: Its texts are too long together.
    """
    # A character of JSON has at most 12 bytes (an escaped pair of surrogates).
    if len(body) > _MAX_CHAR_BYTES * max_chars + _OTHER_BYTES:
        raise PayloadTooLargeError(
            f"Request body is {len(body)} bytes, too many for {max_chars} characters "
            "(applications.max_chars). Split the request."
        )
    fields = decode_json(body)
    if (num_chars := _num_chars(fields)) > max_chars:
        raise PayloadTooLargeError(
            f"The texts of the request have {num_chars} characters; the limit is {max_chars} "
            "(applications.max_chars). Split the request."
        )
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        text = first["msg"][0].lower() + first["msg"][1:]
        raise InvalidRequestError(f"{param or 'body'}: {text}", param=param) from None
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None


def _num_chars(value: Any) -> int:
    """Return the number of characters of all texts in a JSON value."""
    total, values = 0, [value]
    while values:
        current = values.pop()
        if isinstance(current, str):
            total += len(current)
        elif isinstance(current, dict):
            values += current.values()
            total += sum(map(len, current))
        elif isinstance(current, list):
            values += current
    return total


def event_schema(result: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one server-sent event whose result has the schema given."""
    fields: dict[str, dict[str, Any]] = {
        "delta": {"type": "string"},
        "result": result,
        "error": {"type": "object"},
    }
    content = [
        {"type": "object", "required": [name], "properties": {name: schema}}
        for name, schema in fields.items()
    ]
    data = {"contentMediaType": "application/json", "contentSchema": {"anyOf": content}}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "anyOf": [{"const": "[DONE]"}, data]},
        },
    }
