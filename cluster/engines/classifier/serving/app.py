"""The encoder's HTTP surface as one plain ASGI callable: the paths of the configured tasks.

Reads a body, asks the service, writes a body; every error leaves here in OpenAI's shape. Holds no
state of requests. Whoever drives it cancels the task when the client leaves.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
import numpy as np

from cluster.asgi import Receive, Scope, Send, usage_of
from cluster.config import ClassifierConfig
from cluster.engines.classifier.serving import openapi, schema
from cluster.engines.classifier.serving.cache import CachingService
from cluster.engines.classifier.serving.insight import Insight
from cluster.engines.classifier.serving.jobs import Encoded, Timings
from cluster.engines.classifier.serving.tasks import make_tasks
from cluster.engines.classifier.serving.tasks.base import B, Task
from cluster.engines.classifier.serving.tasks.classify import ClassifyReply, ClassifyRequest
from cluster.errors import (
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    RequestError,
)

log = logging.getLogger(__name__)

encode_json = msgspec.json.Encoder().encode

TENANT = b"x-tandem-tenant"
"""The header in which the router says whose request it is."""

MANY_NUMBERS = 50_000
"""Results of so many make a reply in a thread: some 5 ms, in which the loop serves nobody else."""

T = TypeVar("T")
Reply = tuple[bytes, Encoded]
"""A body, and what it was made of."""


class ClassifierApp:
    """The ASGI application of one encoder.

    Args:
        config: The pool; its name is the model's name in requests and answers.
        service: What computes.
        insight: What watches and explains the same model.
    """

    def __init__(self, config: ClassifierConfig, service: CachingService, insight: Insight) -> None:
        self._config = config
        self._caching = service
        self._insight = insight
        self._tasks = make_tasks(config, service.model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            raise ValueError(f"only HTTP is served here, not {scope['type']}")
        try:
            if scope["path"] == openapi.PATH:
                await _send(send, 200, encode_json(openapi.document(self._tasks)), {})
                return
            body, encoded = await self._answer(scope, receive)
            usage_of(scope).prompt_tokens = encoded.num_tokens
            await _send(send, 200, body, _timing_headers(encoded.timings))
        except _ClientLeftError:
            return
        except RequestError as error:
            await _send(send, error.status, encode_json(error.body()), error.headers())

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        task = self._tasks.get(scope["path"])
        if task is None:
            raise NotFoundError(f"no such path; {self._config.name} serves {list(self._tasks)}")
        if scope["method"] != "POST":
            raise MethodNotAllowedError(f"{scope['path']} takes POST alone")
        body = await _read(receive)
        try:
            return await self._do(task, body, self._tenant(scope))
        except RequestError:
            raise
        except Exception:
            log.exception("%s failed", scope["path"])
            raise InternalError("the request failed; see the log") from None

    async def _do(self, task: Task[B], body: bytes, tenant: bytes) -> Reply:
        request = schema.parse(task.decoder, body)
        self._check_model(request.model)
        how, inputs = task.how(request), task.inputs(request)
        encoded = await self._caching.encode(how, inputs, tenant)
        large = _is_large(encoded)
        reply = await _run(lambda: task.reply(request, encoded), in_a_thread=large)
        if isinstance(request, ClassifyRequest) and isinstance(reply, ClassifyReply):
            reply = await self._insight.add(request, encoded, reply)
        return await _run(lambda: encode_json(reply), in_a_thread=large), encoded

    def _tenant(self, scope: Scope) -> bytes:
        if not self._caching.isolates_tenants:
            return b""
        return next((value for name, value in scope["headers"] if name.lower() == TENANT), b"")

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._config.name:
            raise NotFoundError(
                f"the model {model!r} does not exist; this is {self._config.name!r}", param="model"
            )


def _is_large(encoded: Encoded) -> bool:
    rows = encoded.rows
    numbers = rows.size if isinstance(rows, np.ndarray) else sum(row.size for row in rows)
    return numbers >= MANY_NUMBERS


async def _run(function: Callable[[], T], *, in_a_thread: bool) -> T:
    return await asyncio.to_thread(function) if in_a_thread else function()


class _ClientLeftError(Exception):
    """The client left before its body was complete."""


async def _read(receive: Receive) -> bytes:
    """The whole body; the router bounds it."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeftError
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
