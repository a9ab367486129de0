"""From the scores of tokens to the entities of a text. Pure.

The strategies are those of transformers' token-classification pipeline, with the same results:
``none`` gives each token, ``simple`` joins neighbours of one label, and ``first``, ``average`` and
``max`` first let the tokens of a word agree on one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["none", "simple", "first", "average", "max"]
OUTSIDE = "O"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one text."""

    scores: NDArray[np.float32]
    """[tokens, labels]"""
    spans: NDArray[np.int64]
    """[tokens, 2]: characters from and up to."""
    continues: NDArray[np.bool_]
    """[tokens]: whether a token continues the word of the one before."""


@dataclass(frozen=True, slots=True)
class Span:
    """A label for the characters from ``start`` up to ``end``."""

    label: str
    score: float
    start: int
    end: int


def find_spans(tokens: Tokens, labels: Sequence[str], strategy: Strategy) -> list[Span]:
    """The entities of a text in order; what is labelled ``O`` is none."""
    if not len(tokens.spans):
        return []
    words = strategy not in ("none", "simple")
    found = _by_word(tokens, labels, strategy) if words else _by_token(tokens, labels)
    if strategy != "none":
        found = [_joined(group) for group in _groups(found)]
    return [span for span in found if span.label != OUTSIDE]


def _by_token(tokens: Tokens, labels: Sequence[str]) -> list[Span]:
    best = tokens.scores.argmax(1)
    scores = tokens.scores.max(1)
    return [
        Span(labels[column], score, start, end)
        for column, score, (start, end) in zip(
            best.tolist(), scores.tolist(), tokens.spans.tolist(), strict=True
        )
    ]


def _by_word(tokens: Tokens, labels: Sequence[str], strategy: Strategy) -> list[Span]:
    begins = ~tokens.continues
    begins[0] = True
    firsts = np.flatnonzero(begins)
    scores = _word_scores(tokens.scores, firsts, strategy)
    lasts = np.append(firsts[1:], len(begins)) - 1
    spans = np.stack([tokens.spans[firsts, 0], tokens.spans[lasts, 1]], 1)
    return _by_token(Tokens(scores, spans, np.zeros(len(firsts), np.bool_)), labels)


def _word_scores(
    scores: NDArray[np.float32], firsts: NDArray[np.int64], strategy: Strategy
) -> NDArray[np.float32]:
    """[words, labels]: the scores by which the tokens of a word agree."""
    if strategy == "first":
        return scores[firsts]
    counts = np.diff(np.append(firsts, len(scores)))
    if strategy == "average":
        return np.asarray(np.add.reduceat(scores, firsts) / counts[:, None], np.float32)
    top = scores.max(1)
    words = zip(firsts, counts, strict=True)
    return scores[[first + top[first : first + count].argmax() for first, count in words]]


def _groups(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Neighbours of one label; a ``B-`` begins a new group."""
    group = [spans[0]]
    for span in spans[1:]:
        begins, tag = _tag(span.label)
        if tag == _tag(group[-1].label)[1] and not begins:
            group.append(span)
        else:
            yield group
            group = [span]
    yield group


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and of which kind: ``B-PER`` is (True, ``PER``)."""
    if label.startswith(("B-", "I-")):
        return label[0] == "B", label[2:]
    return False, label


def _joined(group: Sequence[Span]) -> Span:
    label = group[0].label.split("-", 1)[-1]
    score = sum(span.score for span in group) / len(group)
    return Span(label, score, group[0].start, group[-1].end)
