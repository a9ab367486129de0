"""``/info``: facts about the model, in the format of text-embeddings-inference."""

from typing import Any

from msgspec import Struct

from cluster.engines.classifier.serving.tools.base import Tool

_POOLING_NAMES = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last_token"}


class InfoBody(Struct, frozen=True, kw_only=True):
    """No body."""

    model: str | None = None


class InfoReply(Struct, frozen=True, kw_only=True):
    """Facts about the model and the limits of requests."""

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_type: dict[str, Any]
    """One of ``classifier``, ``reranker`` and ``embedding``, with labels or pooling."""
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None = None
    max_client_batch_size: int
    auto_truncate: bool = False
    tokenization_workers: int = 2
    version: str
    sha: str | None = None
    docker_label: str | None = None
    served_model_name: str
    tasks: list[str]


class Info(Tool[InfoBody]):
    """``GET /info``."""

    method = "GET"
    paths = ("/info",)
    summary = "Describe the model and the limits of requests."
    request = InfoBody
    response = InfoReply

    def answer(self, body: InfoBody) -> InfoReply:
        from cluster import __version__

        config = self.config
        return InfoReply(
            model_id=config.model,
            model_dtype=config.dtype,
            model_type=self._model_type(),
            max_concurrent_requests=config.max_in_flight,
            max_input_length=self.model.tokenizer.max_tokens,
            max_batch_tokens=config.max_batch_tokens,
            max_client_batch_size=config.max_texts,
            version=__version__,
            served_model_name=config.name,
            tasks=[*config.tasks],
        )

    def _model_type(self) -> dict[str, Any]:
        if self.config.tasks[0] in ("embed", "embed-sparse"):
            mode = self.model.pooling.modes[0]
            is_sparse = self.config.tasks[0] == "embed-sparse"
            pooling = "splade" if is_sparse else _POOLING_NAMES.get(mode, mode)
            return {"embedding": {"pooling": pooling}}
        labels = dict(enumerate(self.model.labels))
        kind = "reranker" if {"score", "rerank"} & {*self.config.tasks} else "classifier"
        names = {str(index): label for index, label in labels.items()}
        return {kind: {"id2label": names, "label2id": {v: k for k, v in labels.items()}}}
