from collections.abc import Sequence

import numpy as np
import pytest

from cluster.engines.classifier.serving.tasks.token_classification import (
    Span,
    Strategy,
    TokenScores,
    find_spans,
)

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def tokens(*rows: tuple[str, int, int, bool, dict[str, float]]) -> TokenScores:
    """Rows are (text, start, end, continues, scores by label); other labels score 0."""
    scores = [[row[4].get(label, 0.0) for label in LABELS] for row in rows]
    return TokenScores(
        np.array(scores, np.float32),
        np.array([row[1:3] for row in rows], np.int64),
        np.array([row[3] for row in rows], np.bool_),
    )


ANNA_BERGER = tokens(
    ("An", 0, 2, False, {"B-PER": 0.5, "O": 0.4}),
    ("##na", 2, 4, True, {"I-LOC": 0.875, "B-PER": 0.75}),
    ("Berger", 5, 11, False, {"I-PER": 0.75}),
    ("in", 12, 14, False, {"O": 1.0}),
    ("Berlin", 15, 21, False, {"B-LOC": 0.5}),
    ("Paris", 22, 27, False, {"B-LOC": 0.25}),
)
BERLIN_PARIS = [Span("LOC", 0.5, 15, 21), Span("LOC", 0.25, 22, 27)]


@pytest.mark.parametrize(
    ("strategy", "spans"),
    [
        ("none", [("B-PER", 0, 2), ("I-LOC", 2, 4), ("I-PER", 5, 11), ("B-LOC", 15, 21)]),
        ("simple", [("PER", 0, 2), ("LOC", 2, 4), ("PER", 5, 11), ("LOC", 15, 21)]),
        ("first", [("PER", 0, 11), ("LOC", 15, 21)]),
        ("average", [("PER", 0, 11), ("LOC", 15, 21)]),
        ("max", [("LOC", 0, 4), ("PER", 5, 11), ("LOC", 15, 21)]),
    ],
)
def test_each_strategy(strategy: Strategy, spans: Sequence[tuple[str, int, int]]) -> None:
    found = find_spans(ANNA_BERGER, LABELS, strategy)
    last = "B-LOC" if strategy == "none" else "LOC"
    assert [(s.label, s.start, s.end) for s in found] == [*spans, (last, 22, 27)]


def test_the_score_is_the_mean_of_the_joined_tokens() -> None:
    first, *rest = find_spans(ANNA_BERGER, LABELS, "first")
    assert first == Span("PER", (0.5 + 0.75) / 2, 0, 11)
    assert rest == BERLIN_PARIS
    average, *_ = find_spans(ANNA_BERGER, LABELS, "average")
    assert average.score == ((0.5 + 0.75) / 2 + 0.75) / 2


def test_labels_without_prefix_are_joined_and_o_separates() -> None:
    scores = np.array([[0, 1], [0, 1], [1, 0], [0, 1]], np.float32)
    spans = np.array([[0, 1], [2, 3], [4, 5], [6, 7]])
    tokens = TokenScores(scores, spans, np.zeros(4, np.bool_))
    assert find_spans(tokens, ("O", "noun"), "simple") == [
        Span("noun", 1.0, 0, 3),
        Span("noun", 1.0, 6, 7),
    ]


def test_no_tokens_no_entities() -> None:
    for strategy in ("none", "simple", "first", "average", "max"):
        assert find_spans(tokens(), LABELS, strategy) == []  # type: ignore[arg-type]
