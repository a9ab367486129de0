"""API of text-embeddings-inference: ``/predict``, ``/embed``, ``/similarity`` and others."""

from typing import Any, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from cluster.engines.classifier.model.types import Side
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.endpoints import Fields, Translation, has_field
from cluster.engines.classifier.serving.inputs import Input
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tasks.classify import (
    Classify,
    ClassifyReply,
    ClassifyRequest,
    Score,
)
from cluster.engines.classifier.serving.tasks.embed import (
    Embed,
    EmbeddingsReply,
    EmbeddingsRequest,
    Similarity,
    SimilarityRequest,
    TokenVectors,
    TokenVectorsRequest,
)
from cluster.engines.classifier.serving.tasks.embed_sparse import EmbedSparse, SparseRequest, Term
from cluster.engines.classifier.serving.tasks.rerank import Rerank, RerankReply, RerankRequest
from cluster.errors import InvalidRequestError

API = "text-embeddings-inference"
Direction = Literal["Left", "Right", "left", "right"]
_SIDES: dict[str, Side] = {"left": "left", "right": "right"}


class TeiBody(Struct, frozen=True, kw_only=True):
    """Fields of every body."""

    model: str | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    """Must be null: prompts are not stored with the model."""

    def common(self, model: str | None = None) -> dict[str, Any]:
        """Return the fields that all tasks share."""
        if self.prompt_name is not None:
            raise InvalidRequestError("prompt_name: the model has no prompts", param="prompt_name")
        direction = (self.truncation_direction or "").lower()
        return {
            "model": self.model or model,
            "truncate": UNSET if self.truncate is None else self.truncate,
            "truncation_side": _SIDES.get(direction),
        }


class PredictBody(TeiBody, frozen=True, kw_only=True):
    """A text; a pair as a list of two; or a batch, a list of lists of one or two texts."""

    inputs: str | list[str | list[str]]
    raw_scores: bool = False

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and not isinstance(self.inputs[0], str)


def _to_classify(body: PredictBody) -> ClassifyRequest:
    inputs = body.inputs
    items: list[Any] = [inputs] if isinstance(inputs, str) else inputs
    schema.check_count(len(items), len(items), "inputs")
    if all(isinstance(item, str) for item in items):
        items = [[str(item) for item in items]]
    sizes = {len(item) if isinstance(item, list) else 0 for item in items}
    if not sizes <= {1, 2}:
        message = (
            "inputs: expected a text, a pair of texts, or a list of lists of one or two texts; for "
            "several texts send [[text], [text]]"
        )
        raise InvalidRequestError(message, param="inputs")
    return ClassifyRequest(
        **body.common(),
        input=[item if len(item) == 2 else item[0] for item in items],
        use_activation=False if body.raw_scores else None,
    )


def _from_classify(
    body: PredictBody, reply: ClassifyReply, _task: Task[Any]
) -> list[Score] | list[list[Score]]:
    scores = [item.scores for item in reply.data]
    return scores if body.is_batch else scores[0]


class EmbedBody(TeiBody, frozen=True, kw_only=True):
    """Texts or token ids, and the form of their vectors."""

    inputs: Input
    normalize: bool = True
    dimensions: schema.AtLeastOne | None = None
    encoding_format: Literal["float", "base64"] = "float"


def to_embed(body: EmbedBody) -> EmbeddingsRequest:
    return EmbeddingsRequest(
        **body.common(),
        input=body.inputs,
        normalize=body.normalize,
        dimensions=body.dimensions,
        encoding_format=body.encoding_format,
    )


def from_embed(
    _body: EmbedBody, reply: EmbeddingsReply, _task: Task[Any]
) -> list[list[float] | str]:
    return [item.embedding for item in reply.data]


class InputsBody(TeiBody, frozen=True, kw_only=True):
    """Texts or token ids."""

    inputs: Input


class SimilarityParameters(TeiBody, frozen=True, kw_only=True):
    """Treatment of long sentences."""


class SimilarityBody(Struct, frozen=True, kw_only=True):
    """A sentence and those to compare it with."""

    model: str | None = None
    inputs: SimilarityRequest
    parameters: SimilarityParameters | None = None


def to_similarity(body: SimilarityBody) -> SimilarityRequest:
    inputs = body.inputs
    return SimilarityRequest(
        **(body.parameters or SimilarityParameters()).common(body.model),
        source_sentence=inputs.source_sentence,
        sentences=inputs.sentences,
    )


class RankTextsBody(TeiBody, frozen=True, kw_only=True):
    """A query and texts to sort by their relevance to it."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class Rank(Struct, frozen=True):
    """Relevance of one text; ``index`` is its index in the request."""

    index: int
    score: float
    text: str | UnsetType = UNSET


def _to_rerank(body: RankTextsBody) -> RerankRequest:
    return RerankRequest(
        **body.common(),
        query=body.query,
        documents=[*body.texts],
        use_activation=False if body.raw_scores else None,
    )


def _from_rerank(body: RankTextsBody, reply: RerankReply, _task: Task[Any]) -> list[Rank]:
    return [
        Rank(r.index, r.relevance_score, body.texts[r.index] if body.return_text else UNSET)
        for r in reply.results
    ]


def unchanged(_body: Any, reply: Any, _task: Task[Any]) -> Any:
    return reply


def compares_sentences(fields: Fields) -> bool:
    """Return True if the inputs are those of a similarity."""
    inputs = bytes(fields.get("inputs", Raw()))
    return inputs.startswith(b"{") and b'"source_sentence"' in inputs


TRANSLATIONS = (
    Translation(
        API, ("/predict", "/"), Classify, PredictBody, list[Any], _to_classify, _from_classify
    ),
    Translation(
        API, ("/embed", "/"), Embed, EmbedBody, list[list[float] | str], to_embed, from_embed
    ),
    Translation(
        API,
        ("/embed_all",),
        TokenVectors,
        InputsBody,
        list[list[list[float]]],
        lambda body: TokenVectorsRequest(**body.common(), input=body.inputs),
        unchanged,
    ),
    Translation(
        API,
        ("/embed_sparse", "/"),
        EmbedSparse,
        InputsBody,
        list[list[Term]],
        lambda body: SparseRequest(**body.common(), input=body.inputs),
        unchanged,
    ),
    Translation(
        API, ("/similarity",), Similarity, SimilarityBody, list[float], to_similarity, unchanged
    ),
    Translation(
        API,
        ("/",),
        Similarity,
        SimilarityBody,
        list[float],
        to_similarity,
        unchanged,
        marks=compares_sentences,
    ),
    Translation(
        API,
        ("/rerank",),
        Rerank,
        RankTextsBody,
        list[Rank],
        _to_rerank,
        _from_rerank,
        marks=has_field("texts"),
    ),
    Translation(API, ("/",), Rerank, RankTextsBody, list[Rank], _to_rerank, _from_rerank),
)
