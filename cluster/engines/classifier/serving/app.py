"""HTTP interface of a classifier: an ASGI app with the paths of the configured tasks.

Errors are returned in OpenAI's format. The app keeps no state of requests; its caller cancels the
task of a request whose client disconnects.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np

from cluster.asgi import Receive, Scope, Send, usage_of
from cluster.config import ClassifierConfig
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.cache import CachingService
from cluster.engines.classifier.serving.insight import Insight
from cluster.engines.classifier.serving.jobs import Encoded, Timings
from cluster.engines.classifier.serving.tasks import make_tasks
from cluster.engines.classifier.serving.tasks.base import RequestT, T, Task
from cluster.engines.classifier.serving.tasks.classify import ClassifyReply, ClassifyRequest
from cluster.errors import InternalError, MethodNotAllowedError, NotFoundError, RequestError

log = logging.getLogger(__name__)

encode_json = msgspec.json.Encoder().encode

OPENAPI_PATH = "/openapi.json"
TENANT_HEADER = b"x-tandem-tenant"
"""Header in which the router names the tenant."""

LARGE_RESULT = 50_000
"""Numbers in a result from which the reply is made in a thread; on the event loop it would block
other requests for about 5 ms."""

Reply = tuple[bytes, Encoded]
"""A reply's body, and the results it was made from."""


class ClassifierApp:
    """ASGI application of one classifier.

    Args:
        config: The pool; its name is the model's name in requests and replies.
        service: Computes the results.
        insight: Explains classifications and counts drift.
    """

    def __init__(self, config: ClassifierConfig, service: CachingService, insight: Insight) -> None:
        self._config = config
        self._service = service
        self._insight = insight
        self._tasks = make_tasks(config, service.service.model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"expected an HTTP request, got {scope['type']}")
        try:
            if scope["path"] == OPENAPI_PATH:
                return await _send(send, 200, encode_json(openapi_document(self._tasks)), {})
            body, encoded = await self._answer(scope, receive)
            usage_of(scope).prompt_tokens = encoded.num_tokens
            await _send(send, 200, body, _timing_headers(encoded.timings))
        except _ClientDisconnectedError:
            pass
        except RequestError as error:
            await _send(send, error.status, encode_json(error.body()), error.headers())

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        path = scope["path"]
        task = self._tasks.get(path)
        if task is None:
            paths = ", ".join(self._tasks)
            raise NotFoundError(f"no such path: {path}; {self._config.name} serves {paths}")
        if scope["method"] != "POST":
            raise MethodNotAllowedError(f"{path} takes only POST, not {scope['method']}")
        body = await _read(receive)
        try:
            return await self._run_task(task, body, self._tenant(scope))
        except RequestError:
            raise
        except Exception:
            log.exception("%s failed", path)
            raise InternalError("the request failed; see the log") from None

    async def _run_task(self, task: Task[RequestT], body: bytes, tenant: bytes) -> Reply:
        request = schema.parse(task.decoder, body)
        if request.model not in (None, *self._config.model_names):
            message = f"the model {request.model!r} does not exist; this is {self._config.name!r}"
            raise NotFoundError(message, param="model")
        options, inputs = task.options(request), task.inputs(request)
        encoded = await self._service.encode(options, inputs, tenant)
        is_large = _is_large(encoded)
        reply = await _run(lambda: task.reply(request, encoded), in_thread=is_large)
        if isinstance(request, ClassifyRequest) and isinstance(reply, ClassifyReply):
            reply = await self._insight.add(request, encoded, reply)
        return await _run(lambda: encode_json(reply), in_thread=is_large), encoded

    def _tenant(self, scope: Scope) -> bytes:
        if not self._service.isolates_tenants:
            return b""
        headers = scope["headers"]
        return next((value for name, value in headers if name.lower() == TENANT_HEADER), b"")


def openapi_document(tasks: Mapping[str, Task[Any]]) -> dict[str, Any]:
    bodies = [body for task in tasks.values() for body in (task.request, task.response)]
    # The prefix keeps the names apart from vLLM's in the router's document.
    reference = "#/components/schemas/Classifier.{name}"
    schemas, components = msgspec.json.schema_components(bodies, ref_template=reference)
    contents = iter([{"application/json": {"schema": body}} for body in schemas])
    timings = {name: {"schema": {"type": "number"}} for name in _timing_headers(Timings(0, 0, 0))}
    paths = {
        path: {
            "post": {
                "summary": task.summary,
                "tags": ["Classifiers"],
                "requestBody": {"required": True, "content": next(contents)},
                "responses": {
                    "200": {"description": "OK", "headers": timings, "content": next(contents)}
                },
            }
        }
        for path, task in tasks.items()
    }
    named = {f"Classifier.{name}": schema for name, schema in components.items()}
    return {"openapi": "3.1.0", "paths": paths, "components": {"schemas": named}}


def _is_large(encoded: Encoded) -> bool:
    rows = encoded.rows
    numbers = rows.size if isinstance(rows, np.ndarray) else sum(row.size for row in rows)
    return numbers >= LARGE_RESULT


async def _run(function: Callable[[], T], *, in_thread: bool) -> T:
    return await asyncio.to_thread(function) if in_thread else function()


class _ClientDisconnectedError(Exception):
    """The client disconnected before its body was complete."""


async def _read(receive: Receive) -> bytes:
    """Return the whole body; the router limits its size."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientDisconnectedError
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _send(send: Send, status: int, body: bytes, extra: Mapping[str, str]) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *((name.encode(), value.encode()) for name, value in extra.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _timing_headers(timings: Timings) -> dict[str, str]:
    return {
        "x-tandem-tokenize-ms": f"{timings.tokenize_s * 1e3:.2f}",
        "x-tandem-queue-ms": f"{timings.queue_s * 1e3:.2f}",
        "x-tandem-compute-ms": f"{timings.compute_s * 1e3:.2f}",
    }
