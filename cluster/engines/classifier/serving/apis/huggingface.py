"""API of Hugging Face's pipelines, as ``huggingface_hub.InferenceClient`` calls it.

A client that is given a URL as model posts to it. ``/`` runs the pool's first task, and
``/pipeline/<task>`` the named one. All clients but that of ``feature_extraction`` send the object
``parameters``.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.apis import tei
from cluster.engines.classifier.serving.endpoints import Fields, Translation
from cluster.engines.classifier.serving.inputs import Input
from cluster.engines.classifier.serving.tasks.base import Task
from cluster.engines.classifier.serving.tasks.classify import (
    Classify,
    ClassifyReply,
    ClassifyRequest,
    Score,
)
from cluster.engines.classifier.serving.tasks.embed import Embed, Similarity
from cluster.engines.classifier.serving.tasks.fill_mask import (
    FillMask,
    FillMaskReply,
    FillMaskRequest,
    TopK,
)
from cluster.engines.classifier.serving.tasks.token_classification import (
    Strategy,
    TokenClassification,
    TokenClassificationReply,
    TokenClassificationRequest,
)
from cluster.errors import InvalidRequestError

API = "Hugging Face"
MAX_SEQUENCES = 1000
"""Texts in a reply to mask filling, each as long as its input; 1,000 take 0.1 s."""


class PipelineBody(Struct, frozen=True, kw_only=True):
    """Fields of every body."""

    model: str | None = None
    options: Mapping[str, Any] | None = None
    """No effect: options of the hosted service."""


class ClassificationParameters(Struct, frozen=True, kw_only=True):
    """Options of text classification."""

    top_k: schema.AtLeastOne | None = None
    function_to_apply: schema.ActivationFunction | None = None
    truncation: bool | None = None


class ClassificationBody(PipelineBody, frozen=True, kw_only=True):
    """A text or several."""

    inputs: Input
    parameters: ClassificationParameters = ClassificationParameters()


def _to_classify(body: ClassificationBody) -> ClassifyRequest:
    parameters = body.parameters
    return ClassifyRequest(
        model=body.model,
        input=body.inputs,
        top_k=parameters.top_k,
        activation=parameters.function_to_apply,
        truncate=UNSET if parameters.truncation is None else parameters.truncation,
    )


def _from_classify(
    _body: ClassificationBody, reply: ClassifyReply, _task: Task[Any]
) -> list[list[Score]]:
    return [item.scores for item in reply.data]


class EntityParameters(Struct, frozen=True, kw_only=True):
    """Options of token classification."""

    aggregation_strategy: Strategy = "simple"
    ignore_labels: list[str] = []
    """Further labels to leave out; ``O`` always is."""
    stride: schema.AtLeastZero | None = None


class EntityBody(PipelineBody, frozen=True, kw_only=True):
    """A text or several."""

    inputs: str | list[str]
    parameters: EntityParameters = EntityParameters()


class PipelineEntity(Struct, frozen=True):
    """An entity, or with the strategy ``none``, a token of one."""

    score: float
    word: str
    start: int
    end: int
    entity_group: str | UnsetType = UNSET
    entity: str | UnsetType = UNSET


def _to_entities(body: EntityBody) -> TokenClassificationRequest:
    parameters = body.parameters
    return TokenClassificationRequest(
        model=body.model,
        input=body.inputs,
        aggregation_strategy=parameters.aggregation_strategy,
        stride=parameters.stride,
    )


def _from_entities(body: EntityBody, reply: TokenClassificationReply, _task: Task[Any]) -> Any:
    parameters = body.parameters
    field = "entity" if parameters.aggregation_strategy == "none" else "entity_group"
    texts = [
        [
            PipelineEntity(found.score, found.text, found.start, found.end, **{field: found.label})
            for found in item.entities
            if found.label not in parameters.ignore_labels
        ]
        for item in reply.data
    ]
    return texts[0] if isinstance(body.inputs, str) else texts


class MaskParameters(Struct, frozen=True, kw_only=True):
    """Options of mask filling."""

    top_k: TopK = 5
    targets: list[str] | None = None
    """Must be null: only the best tokens are known."""


class MaskBody(PipelineBody, frozen=True, kw_only=True):
    """A text or several."""

    inputs: str | list[str]
    parameters: MaskParameters = MaskParameters()


class FilledSequence(Struct, frozen=True):
    """A candidate for a mask, and the text with it."""

    score: float
    token: int
    token_str: str
    sequence: str


def _to_masks(body: MaskBody) -> FillMaskRequest:
    if body.parameters.targets:
        message = "parameters.targets is not available; the best tokens are returned"
        raise InvalidRequestError(message, param="parameters.targets")
    return FillMaskRequest(model=body.model, input=body.inputs, top_k=body.parameters.top_k)


def _from_masks(body: MaskBody, reply: FillMaskReply, task: Task[Any]) -> Any:
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    count = sum(len(candidates) for item in reply.data for candidates in item.masks)
    if count > MAX_SEQUENCES:
        message = (
            f"the reply has {count} filled texts; the limit is {MAX_SEQUENCES}. Send fewer masks, "
            "lower `top_k`, or use /fill-mask"
        )
        raise InvalidRequestError(message, param="inputs")
    data = [_fill(text, item.masks, task) for text, item in zip(texts, reply.data, strict=True)]
    return data[0] if isinstance(body.inputs, str) else data


def _fill(text: str, masks: list[Any], task: Task[Any]) -> Any:
    """Return the candidates of one mask, or a list of them for each of several."""
    tokenizer, filled = task.model.tokenizer, []
    ids = tokenizer.encode_plain(text).ids
    positions = [index for index, token in enumerate(ids) if token == tokenizer.mask_id]
    # Of several masks, the others stay visible, as in transformers' pipeline.
    skip = len(masks) == 1
    for position, candidates in zip(positions, masks, strict=False):
        rows = []
        for found in candidates:
            row = [*ids[:position], found.token, *ids[position + 1 :]]
            sequence = tokenizer.decode_ids(row, skip_special_tokens=skip)
            rows.append(FilledSequence(found.score, found.token, found.token_str, sequence))
        filled.append(rows)
    return filled[0] if skip else filled


def _is_classification(fields: Fields) -> bool:
    return "parameters" in fields and not tei.compares_sentences(fields)


TRANSLATIONS = (
    Translation(
        API,
        ("/pipeline/text-classification", "/pipeline/sentiment-analysis"),
        Classify,
        ClassificationBody,
        list[list[Score]],
        _to_classify,
        _from_classify,
    ),
    Translation(
        API,
        ("/", "/predict"),
        Classify,
        ClassificationBody,
        list[list[Score]],
        _to_classify,
        _from_classify,
        _is_classification,
    ),
    Translation(
        API,
        ("/", "/pipeline/token-classification", "/pipeline/ner"),
        TokenClassification,
        EntityBody,
        list[Any],
        _to_entities,
        _from_entities,
    ),
    Translation(
        API,
        ("/", "/pipeline/fill-mask"),
        FillMask,
        MaskBody,
        list[Any],
        _to_masks,
        _from_masks,
        is_slow=True,
    ),
    Translation(
        API,
        ("/pipeline/feature-extraction",),
        Embed,
        tei.EmbedBody,
        list[list[float] | str],
        tei.to_embed,
        tei.from_embed,
    ),
    Translation(
        API,
        ("/pipeline/sentence-similarity",),
        Similarity,
        tei.SimilarityBody,
        list[float],
        tei.to_similarity,
        tei.unchanged,
    ),
)
