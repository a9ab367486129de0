"""The encoder's HTTP surface as one plain ASGI callable: ``/classify`` and ``/v1/embeddings``.

Reads a body, asks the service, writes a body; every error leaves here in OpenAI's shape. Holds no
state of requests. Whoever drives it cancels the task when the client leaves.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping

from cluster.asgi import Receive, Scope, Send
from cluster.config import ClassifierConfig, ClassifierTask
from cluster.engines.encoder import openapi, replies, schema
from cluster.engines.encoder.jobs import Timings, TokenIds
from cluster.engines.encoder.service import EncoderService
from cluster.errors import (
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    RequestError,
)

log = logging.getLogger(__name__)

ROUTES: Mapping[str, ClassifierTask] = {"/classify": "classify", "/v1/embeddings": "embed"}

Reply = tuple[bytes, Timings]


class EncoderApp:
    """The ASGI application of one encoder.

    Args:
        config: The pool; its name is the model's name in requests and answers.
        service: A started service.
    """

    def __init__(self, config: ClassifierConfig, service: EncoderService) -> None:
        self._config = config
        self._service = service
        answers: dict[ClassifierTask, Callable[[bytes], Awaitable[Reply]]] = {
            "classify": self._classify,
            "embed": self._embed,
        }
        self._answers = {
            path: answers[task] for path, task in ROUTES.items() if task in config.tasks
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            raise ValueError(f"only HTTP is served here, not {scope['type']}")
        try:
            if scope["path"] == openapi.PATH:
                await _send(send, 200, replies.encode_json(openapi.document(self._answers)), {})
                return
            body, timings = await self._answer(scope, receive)
            await _send(send, 200, body, _timing_headers(timings))
        except _ClientLeftError:
            return
        except RequestError as error:
            await _send(send, error.status, replies.encode_json(error.body()), error.headers())

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        answer = self._answers.get(scope["path"])
        if answer is None:
            raise NotFoundError(f"no such path; {self._config.name} serves {list(self._answers)}")
        if scope["method"] != "POST":
            raise MethodNotAllowedError(f"{scope['path']} takes POST alone")
        body = await _read(receive)
        try:
            return await answer(body)
        except RequestError:
            raise
        except Exception:
            log.exception("%s failed", scope["path"])
            raise InternalError("the request failed; see the log") from None

    async def _classify(self, body: bytes) -> Reply:
        request = schema.parse(schema.classify_decoder, body)
        self._check_model(request.model)
        texts = [request.input] if isinstance(request.input, str) else request.input
        schema.check_count(len(texts), self._config.max_texts)
        encoded = await self._service.encode("classify", texts, request.truncate)
        labels = self._service.model.labels
        reply = replies.classify_body(encoded, self._config.name, labels, request.top_k)
        return reply, encoded.timings

    async def _embed(self, body: bytes) -> Reply:
        request = schema.parse(schema.embeddings_decoder, body)
        self._check_model(request.model)
        hidden_size = self._service.model.hidden_size
        if request.dimensions and request.dimensions > hidden_size:
            message = f"dimensions is {request.dimensions}; the model has {hidden_size}"
            raise InvalidRequestError(message, param="dimensions")
        inputs = self._embed_inputs(request)
        encoded = await self._service.encode("embed", inputs, request.truncate)
        as_text = request.encoding_format == "base64"
        reply = replies.embeddings_body(encoded, self._config.name, request.dimensions, as_text)
        return reply, encoded.timings

    def _embed_inputs(self, request: schema.EmbeddingsRequest) -> list[str] | list[TokenIds]:
        schema.check_count(len(request.input) if isinstance(request.input, list) else 1, 1 << 62)
        items = schema.split_input(request.input)
        schema.check_count(len(items), self._config.max_texts)
        texts = [item for item in items if isinstance(item, str)]
        if texts:
            return texts
        ids = [item for item in items if isinstance(item, list)]
        return [self._token_ids(index, row, request.truncate) for index, row in enumerate(ids)]

    def _token_ids(self, index: int, ids: list[int], truncate: bool) -> TokenIds:
        model = self._service.model
        row = schema.check_ids(index, ids, model.vocab_size)
        if len(row) > model.tokenizer.max_tokens and not truncate:
            raise model.tokenizer.too_long(index, len(row))
        return row[: model.tokenizer.max_tokens]

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._config.name:
            raise NotFoundError(
                f"the model {model!r} does not exist; this is {self._config.name!r}", param="model"
            )


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
