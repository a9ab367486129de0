"""HTTP interface of a classifier: an ASGI app with the paths of the configured tasks.

Errors are returned in OpenAI's format. The app keeps no state of requests; its caller cancels the
task of a request whose client disconnects.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from cluster.asgi import Receive, Scope, Send, read_body, usage_of
from cluster.config import ClassifierConfig
from cluster.engines.base import UNSPECIFIED_MODEL
from cluster.engines.classifier.serving.cache import CachingService
from cluster.engines.classifier.serving.endpoints import (
    Parsed,
    Translation,
    warning_of,
)
from cluster.engines.classifier.serving.insight import Insight
from cluster.engines.classifier.serving.jobs import Encoded, Timings
from cluster.engines.classifier.serving.openapi import (
    TIMING_HEADERS,
    WARNING_HEADER,
    openapi_document,
)
from cluster.engines.classifier.serving.routes import make_routes
from cluster.engines.classifier.serving.tasks.base import T, Task
from cluster.engines.classifier.serving.tasks.classify import ClassifyReply, ClassifyRequest
from cluster.engines.classifier.serving.tools.base import Tool
from cluster.engines.classifier.serving.vectors import BinaryReply
from cluster.errors import InternalError, MethodNotAllowedError, NotFoundError, RequestError

log = logging.getLogger(__name__)

encode_json = msgspec.json.Encoder().encode

OPENAPI_PATH = "/openapi.json"
TENANT_HEADER = b"x-tandem-tenant"
"""Header in which the router names the tenant."""

_TIMINGS = tuple(name.encode() for name in TIMING_HEADERS)

LARGE_RESULT = 50_000
"""Numbers in a result from which the reply is made in a thread; on the event loop it would block
other requests for about 5 ms."""

Headers = list[tuple[bytes, bytes]]
JSON_HEADERS: Headers = [(b"content-type", b"application/json")]
BINARY_HEADERS: Headers = [(b"content-type", b"application/octet-stream")]


class Reply(NamedTuple):
    """An HTTP reply, and the tokens that the model read for it."""

    content: bytes
    headers: Headers
    num_tokens: int = 0


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
        self._paths = make_routes(config, service.service.model)

    def reconfigure(self, config: ClassifierConfig) -> None:
        """Apply changed names and limits."""
        self._paths = make_routes(config, self._service.service.model)
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"expected an HTTP request, got {scope['type']}")
        try:
            if scope["path"] == OPENAPI_PATH:
                content = encode_json(openapi_document(self._paths))
                return await _send(send, 200, content, JSON_HEADERS)
            reply = await self._answer(scope, receive)
            usage_of(scope).prompt_tokens = reply.num_tokens
            await _send(send, 200, reply.content, reply.headers)
        except _ClientDisconnectedError:
            pass
        except RequestError as error:
            headers = [(name.encode(), value.encode()) for name, value in error.headers().items()]
            await _send(send, error.status, encode_json(error.body()), [*JSON_HEADERS, *headers])

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        path = scope["path"]
        endpoints = self._paths.get(path)
        if endpoints is None:
            paths = ", ".join(self._paths)
            raise NotFoundError(f"no such path: {path}; {self._config.name} serves {paths}")
        if scope["method"] != endpoints.method:
            raise MethodNotAllowedError.for_path(path, scope["method"], [endpoints.method])
        body = await read_body(receive)  # the router limits its size
        if body is None:
            raise _ClientDisconnectedError
        try:
            parsed = endpoints.parse(body if endpoints.method == "POST" else b"{}")
            reply = await self._run(parsed, self._tenant(scope))
        except RequestError:
            raise
        except Exception:
            log.exception("%s failed", path)
            raise InternalError("the request failed; see the log") from None
        if parsed.ignored:
            reply.headers.append((WARNING_HEADER.encode(), warning_of(parsed.ignored).encode()))
        return reply

    async def _run(self, parsed: Parsed, tenant: bytes) -> Reply:
        endpoint, body, _ = parsed
        if body.model not in (None, *self._config.model_names, UNSPECIFIED_MODEL):
            name = self._config.name
            message = f"the model {body.model[:100]!r} does not exist; this is {name!r}"
            raise NotFoundError(message, param="model")
        if isinstance(endpoint.handler, Tool):
            tool = endpoint.handler
            content = await asyncio.to_thread(lambda: encode_json(tool.answer(body)))
            return Reply(content, [*JSON_HEADERS])
        return await self._run_task(endpoint.handler, endpoint.translation, body, tenant)

    async def _run_task(
        self, task: Task[Any], translation: Translation | None, body: Any, tenant: bytes
    ) -> Reply:
        request = body if translation is None else translation.to_request(body)
        options, inputs = task.options(request), task.inputs(request)
        encoded = await self._service.encode(options, inputs, tenant)
        is_large = _is_large(encoded)
        reply = await _call(lambda: task.reply(request, encoded), in_thread=is_large)
        if isinstance(request, ClassifyRequest) and isinstance(reply, ClassifyReply):
            reply = await self._insight.add(request, inputs, encoded, reply)
        headers = _timing_headers(encoded.timings)
        if isinstance(reply, BinaryReply):
            headers += BINARY_HEADERS
            if reply.metadata is not None:
                headers.append((b"metadata", reply.metadata.encode()))
            return Reply(reply.content, headers, encoded.num_tokens)

        def encode() -> bytes:
            return encode_json(
                reply if translation is None else translation.to_reply(body, reply, task)
            )

        is_slow = translation is not None and translation.is_slow
        content = await _call(encode, in_thread=is_large or is_slow)
        return Reply(content, headers + JSON_HEADERS, encoded.num_tokens)

    def _tenant(self, scope: Scope) -> bytes:
        if not self._service.isolates_tenants:
            return b""
        headers = scope["headers"]
        return next((value for name, value in headers if name.lower() == TENANT_HEADER), b"")


def _is_large(encoded: Encoded) -> bool:
    rows = encoded.rows
    numbers = rows.size if isinstance(rows, np.ndarray) else sum(row.size for row in rows)
    return numbers >= LARGE_RESULT


async def _call(function: Callable[[], T], *, in_thread: bool) -> T:
    return await asyncio.to_thread(function) if in_thread else function()


class _ClientDisconnectedError(Exception):
    """The client disconnected before its body was complete."""


async def _send(
    send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    headers = [(b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _timing_headers(timings: Timings) -> Headers:
    durations_s = timings.tokenize_s, timings.queue_s, timings.compute_s
    return [(name, b"%.2f" % (s * 1e3)) for name, s in zip(_TIMINGS, durations_s, strict=True)]
