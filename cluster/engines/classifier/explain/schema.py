"""Options and results of explanations."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from cluster.engines.classifier.model.types import Side

MAX_TEXTS = 16
"""Texts in a request with explanations; explaining one takes as long as classifying about 50."""

Method = Literal["integrated_gradients", "rollout"]


class ExplainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of an explanation."""

    method: Method = "integrated_gradients"
    """integrated_gradients: each word's contribution to each label's score. rollout: how much
    attention reaches each word; one forward pass, without labels or signs."""


class Word(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Word as the tokenizer splits the text."""

    text: str
    start: int
    end: int
    """Characters (Unicode code points) of the text, end excluded."""
    in_pair: bool = False
    """True if the word is in the second text of a pair."""


class LabelContributions(msgspec.Struct, frozen=True):
    """Explanation of one label's score."""

    label: str
    score: float
    baseline: float
    """Score of the text with every word masked."""
    error: float
    """Sum of the contributions minus ``score - baseline``."""
    contributions: list[float]
    """Contribution of each word."""


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Explanation of one text's labels."""

    method: Method
    words: list[Word]
    labels: list[LabelContributions] = msgspec.field(default_factory=list)
    """Result of integrated gradients, best label first."""
    weights: list[float] = msgspec.field(default_factory=list)
    """Result of rollout: each word's share of the attention; they sum to 1."""


@dataclass(frozen=True, slots=True)
class Question:
    """Explanation requested for each text."""

    method: Method = "integrated_gradients"
    top_k: int | None = None
    """Number of labels to explain, best first; None explains all."""
    side: Side = "right"
    """Side on which a long text was cut."""
