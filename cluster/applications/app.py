"""ASGI application of the tasks: validates bodies, runs tasks, writes results and streams.

A stream has server-sent events with a JSON object each: ``{"delta": "…"}`` for a piece of text,
``{"result": {…}}`` at the end, then ``[DONE]``; or ``{"error": {…}}`` if the task fails after its
first piece. Before it, an error is the status of the response.
"""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import models_json_schema

from cluster.applications.calls import Calls
from cluster.applications.tasks import Run, Task
from cluster.applications.tasks.table import TASKS_BY_PATH
from cluster.asgi import Receive, Scope, Send, read_body
from cluster.engines.json_body import decode_json
from cluster.errors import (
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    RequestError,
)
from cluster.tasks import TaskResult

logger = logging.getLogger("ray.serve.tandem")

DOCUMENT_PATH = "/openapi.json"
_DONE = b"data: [DONE]\n\n"
_MAX_CHAR_BYTES = 12
_OTHER_BYTES = 1024 * 1024  # of a body that are not its texts
_SCHEMAS = "#/components/schemas/{model}"

MakeRun = Callable[[Scope], Run]
OnEnd = Callable[[str, Calls, bool], None]
"""Called at the end of a task with its name, its calls, and True if it succeeded."""


class TaskApp:
    """ASGI application of all tasks.

    Args:
        make_run: Returns the context of a request's task.
        on_end: See ``OnEnd``.
    """

    def __init__(self, make_run: MakeRun, on_end: OnEnd) -> None:
        self._make_run = make_run
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply = _Reply(send)
        try:
            await self._answer(scope, receive, reply)
        except RequestError as error:
            await reply.fail(error)
        except Exception:
            logger.exception("%s failed", scope["path"])
            await reply.fail(InternalError("The task failed; the replica's log has the traceback."))

    async def _answer(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        method, path = scope["method"], scope["path"]
        if path == DOCUMENT_PATH and method == "GET":
            await reply.send_json(200, openapi())
            return
        task = TASKS_BY_PATH.get(path)
        if task is None:
            raise NotFoundError(f"No such path: {path}. Tasks: {', '.join(TASKS_BY_PATH)}")
        if method != "POST":
            raise MethodNotAllowedError.for_path(path, method, ["POST"])
        body = await read_body(receive)
        if body is None:
            return
        run = self._make_run(scope)
        request = _parse(task, body, run.config.max_chars)
        succeeded = False
        try:
            async with aclosing(task.run(request, run)) as items:
                if getattr(request, "stream", False):
                    await reply.stream(items)
                else:
                    await reply.send_result(items)
            succeeded = True
        finally:
            self._on_end(task.name, run.calls, succeeded)


class _Reply:
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
                await self._send_bytes(200, _encode(item))

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


def _encode(result: TaskResult) -> bytes:
    return TypeAdapter(type(result)).dump_json(result, exclude_none=False)


def _parse(task: Task, body: bytes, max_chars: int) -> Any:
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
        return task.request.model_validate(fields)
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


@cache
def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of all tasks."""
    tasks = TASKS_BY_PATH.values()
    models = [(task.request, "validation") for task in tasks]
    results = [(task.result, "serialization") for task in tasks]
    keys, definitions = models_json_schema([*models, *results], ref_template=_SCHEMAS)  # type: ignore[list-item]
    paths = {path: {"post": _operation(task, keys)} for path, task in TASKS_BY_PATH.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tasks", "version": "1"},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }


def _operation(task: Task, keys: Mapping[Any, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": keys[task.result, "serialization"]}}
    if task.streams:
        content["text/event-stream"] = {"schema": _event(keys[task.result, "serialization"])}
    body = {"application/json": {"schema": keys[task.request, "validation"]}}
    return {
        "summary": (task.request.__doc__ or task.name).splitlines()[0],
        "tags": ["Tasks"],
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "OK", "content": content}},
    }


def _event(result: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one server-sent event of a task whose result has the schema given."""
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
