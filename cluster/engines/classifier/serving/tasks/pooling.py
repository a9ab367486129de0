"""``/pooling``: the plain result of the model for each text, in vLLM's format."""

import time
from collections.abc import Mapping
from typing import Literal

import numpy as np
from msgspec import Struct

from cluster.engines.classifier.model.types import Head, ModelInput
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.inputs import read_inputs
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tasks.embed import MAX_TOKEN_TEXTS, to_unit
from cluster.engines.classifier.serving.vectors import (
    BinaryReply,
    VectorRequest,
    check_format,
    to_binary,
    to_json,
)
from cluster.errors import InvalidRequestError

PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]
_TASKS: Mapping[str, PoolingTask] = {
    "classify": "classify",
    "score": "classify",
    "rerank": "classify",
    "next-sentence": "classify",
    "embed": "embed",
    "token-classification": "token_classify",
}
"""vLLM's task for those of the configuration."""


class PoolingRequest(VectorRequest, frozen=True, kw_only=True):
    """Body of ``POST /pooling``."""

    task: PoolingTask | None = None
    """Result to return; default: that of the pool's first task."""
    dimensions: int | None = None
    """Must be null, as in vLLM."""


class Pooled(Struct, frozen=True):
    """Scores or vector of one text; per token for ``token_embed`` and ``token_classify``."""

    index: int
    data: list[float | list[float]] | str
    object: str = "pooling"


class PoolingReply(schema.ListReply[Pooled], frozen=True, kw_only=True):
    """Reply of ``POST /pooling``."""


class PlainResults(Task[PoolingRequest]):
    """The model's result without labels; it belongs to all tasks that vLLM has, too."""

    name = "embed"
    head = "embed"
    paths = ("/pooling",)
    summary = "Return the scores or vectors of one or more texts."
    request = PoolingRequest
    response = PoolingReply

    def head_for(self, request: PoolingRequest) -> Head:
        task, is_raw = self._task(request), request.activation_choice in (False, "none")
        if task == "token_embed":
            return "embed-tokens"
        if task == "classify":
            return "logits" if is_raw else "classify"
        if task == "embed":
            return "embed-unnormalized" if is_raw else "embed"
        if is_raw:
            message = "use_activation: false is not available for token_classify"
            raise InvalidRequestError(message, param="use_activation")
        return "token-classification"

    def inputs(self, request: PoolingRequest) -> list[ModelInput]:
        if request.dimensions is not None:
            raise InvalidRequestError("dimensions is not available here", param="dimensions")
        if request.stride is not None:
            raise InvalidRequestError("stride is not available here", param="stride")
        limit = self.config.max_texts
        per_token = self._task(request).startswith("token")
        inputs = read_inputs(
            request, self.model, min(MAX_TOKEN_TEXTS, limit) if per_token else limit
        )
        check_format(request, len(inputs))
        return inputs

    def reply(self, request: PoolingRequest, encoded: Encoded) -> PoolingReply | BinaryReply:
        rows = list(encoded.rows)
        if self._task(request) == "token_embed" and request.activation_choice is not False:
            rows = [to_unit(row) for row in rows]
        rows = [np.asarray(row, np.float32) for row in rows]
        reply_id, created = request.reply_id("pooling"), int(time.time())
        name, usage = self.config.name, schema.usage(encoded)
        if request.is_binary:
            return to_binary(request, rows, reply_id, created, name, usage)
        data = [Pooled(index, vector) for index, vector in enumerate(to_json(request, rows))]
        return PoolingReply(id=reply_id, created=created, data=data, model=name, usage=usage)

    def _task(self, request: PoolingRequest) -> PoolingTask:
        available = dict.fromkeys(_TASKS[task] for task in self.config.tasks if task in _TASKS)
        if "embed" in available:
            available["token_embed"] = None
        task = next(iter(available)) if request.task is None else request.task
        if task not in available:
            message = f"task is {task!r}; this model does {', '.join(available)}"
            raise InvalidRequestError(message, param="task")
        return task
