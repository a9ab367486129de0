"""``/token-classification`` and ``/ner``: entities of texts with their character offsets.

The aggregation strategies are those of transformers' token-classification pipeline, with the same
results. ``none`` returns each token and ``simple`` joins neighbours with one label; with ``first``,
``average`` and ``max``, the tokens of a word agree on a label first.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from cluster.engines.classifier.model.types import Merge, Rows
from cluster.engines.classifier.model.windows import Window, merge_spans, merge_tokens
from cluster.engines.classifier.serving import schema
from cluster.engines.classifier.serving.jobs import Encoded
from cluster.engines.classifier.serving.tasks.base import Task

Strategy = Literal["none", "simple", "first", "average", "max"]
OUTSIDE = "O"
"""Label of tokens that belong to no entity."""


class TokenClassificationRequest(schema.LongTextRequest, frozen=True, kw_only=True):
    """Body of ``POST /token-classification``."""

    input: str | list[str]
    aggregation_strategy: Strategy = "simple"
    """Strategy for joining tokens to entities, by the names of transformers' pipeline."""


class Entity(Struct, frozen=True, gc=False):
    """Entity from the character ``start`` up to ``end``."""

    label: str
    score: float
    text: str
    start: int
    end: int


class Labelled(Struct, frozen=True):
    """Entities of one text, in order."""

    index: int
    entities: list[Entity]


class TokenClassificationReply(schema.ListReply[Labelled], frozen=True, kw_only=True):
    """Reply of ``POST /token-classification``."""


class TokenClassification(Task[TokenClassificationRequest]):
    """Task ``token-classification``."""

    name = "token-classification"
    head = "token-classification"
    with_offsets = True
    paths = ("/token-classification", "/ner")
    summary = "Find the entities of one or more texts."
    request = TokenClassificationRequest
    response = TokenClassificationReply

    def inputs(self, request: TokenClassificationRequest) -> list[str]:
        return schema.single_texts(request.input, self.config.max_texts)

    def reply(
        self, request: TokenClassificationRequest, encoded: Encoded
    ) -> TokenClassificationReply:
        texts = [request.input] if isinstance(request.input, str) else request.input
        rows = iter(encoded.rows)
        data = []
        for index, (text, windows) in enumerate(zip(texts, encoded.windows, strict=True)):
            tokens = _merge_windows([next(rows) for _ in windows], windows, request.aggregate)
            data.append(Labelled(index, self._entities(text, tokens, request.aggregation_strategy)))
        return TokenClassificationReply(
            id=request.reply_id("ner"),
            created=int(time.time()),
            data=data,
            model=self.config.name,
            usage=schema.usage(encoded),
        )

    def _entities(self, text: str, tokens: "TokenScores", strategy: Strategy) -> list[Entity]:
        return [
            Entity(span.label, span.score, text[span.start : span.end], span.start, span.end)
            for span in find_spans(tokens, self.model.labels, strategy)
        ]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores and offsets of one text's tokens."""

    scores: NDArray[np.float32]
    """[tokens, labels]"""
    spans: NDArray[np.int64]
    """Character offsets, end excluded, [tokens, 2]."""
    continues: NDArray[np.bool_]
    """True where a token continues the previous token's word, [tokens]."""


@dataclass(frozen=True, slots=True)
class Span:
    """A label for the characters from ``start`` up to ``end``."""

    label: str
    score: float
    start: int
    end: int


def find_spans(tokens: TokenScores, labels: Sequence[str], strategy: Strategy) -> list[Span]:
    """Return the entities of a text in order, without those labelled ``O``."""
    if not len(tokens.spans):
        return []
    by_word = strategy not in ("none", "simple")
    spans = _label_words(tokens, labels, strategy) if by_word else _label_tokens(tokens, labels)
    if strategy != "none":
        spans = [_join(group) for group in _group_by_label(spans)]
    return [span for span in spans if span.label != OUTSIDE]


def _merge_windows(rows: list[Rows], windows: Sequence[Window], merge: Merge) -> TokenScores:
    return TokenScores(merge_tokens(rows, windows, merge), *merge_spans(windows))


def _label_tokens(tokens: TokenScores, labels: Sequence[str]) -> list[Span]:
    best = tokens.scores.argmax(1)
    scores = tokens.scores.max(1)
    return [
        Span(labels[column], score, start, end)
        for column, score, (start, end) in zip(
            best.tolist(), scores.tolist(), tokens.spans.tolist(), strict=True
        )
    ]


def _label_words(tokens: TokenScores, labels: Sequence[str], strategy: Strategy) -> list[Span]:
    starts_word = ~tokens.continues
    starts_word[0] = True
    firsts = np.flatnonzero(starts_word)
    scores = _word_scores(tokens.scores, firsts, strategy)
    lasts = np.append(firsts[1:], len(starts_word)) - 1
    spans = np.stack([tokens.spans[firsts, 0], tokens.spans[lasts, 1]], 1)
    return _label_tokens(TokenScores(scores, spans, np.zeros(len(firsts), np.bool_)), labels)


def _word_scores(
    scores: NDArray[np.float32], firsts: NDArray[np.int64], strategy: Strategy
) -> NDArray[np.float32]:
    """Return scores [words, labels]; ``firsts`` are the words' first tokens."""
    if strategy == "first":
        return scores[firsts]
    counts = np.diff(np.append(firsts, len(scores)))
    if strategy == "average":
        return np.asarray(np.add.reduceat(scores, firsts) / counts[:, None], np.float32)
    top = scores.max(1)
    words = zip(firsts, counts, strict=True)
    return scores[[first + top[first : first + count].argmax() for first, count in words]]


def _group_by_label(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Yield runs of one label; a ``B-`` starts a new run."""
    group = [spans[0]]
    for span in spans[1:]:
        starts_entity, tag = _split_label(span.label)
        if tag == _split_label(group[-1].label)[1] and not starts_entity:
            group.append(span)
        else:
            yield group
            group = [span]
    yield group


def _split_label(label: str) -> tuple[bool, str]:
    """Return whether a label starts an entity, and its kind: ``B-PER`` is (True, ``PER``)."""
    if label.startswith(("B-", "I-")):
        return label[0] == "B", label[2:]
    return False, label


def _join(group: Sequence[Span]) -> Span:
    label = group[0].label.split("-", 1)[-1]
    score = sum(span.score for span in group) / len(group)
    return Span(label, score, group[0].start, group[-1].end)
