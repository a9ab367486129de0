"""What may be asked about a classification, and the answer."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from cluster.engines.classifier.model.template import Side

MAX_TEXTS = 16
"""Of one request with an explanation, each of which takes as long as some 50 texts."""

Method = Literal["integrated_gradients", "rollout"]


class ExplainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to explain."""

    method: Method = "integrated_gradients"
    """integrated_gradients: what each word adds to each label's score. rollout: how far the
    attention reaches each word; one forward pass, no labels, no sign."""


class Word(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A word as the tokenizer splits them."""

    text: str
    start: int
    end: int
    """Characters (Unicode code points) of the text, the end excluded."""
    in_pair: bool = False
    """Whether it stands in the pair of the text."""


class LabelContributions(msgspec.Struct, frozen=True):
    """Why one label has its score."""

    label: str
    score: float
    baseline: float
    """The score of the same text with every word masked."""
    error: float
    """By how much the contributions' sum misses ``score - baseline``."""
    contributions: list[float]
    """By word."""


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why one text has its labels."""

    method: Method
    words: list[Word]
    labels: list[LabelContributions] = msgspec.field(default_factory=list)
    """Of integrated gradients: the best label first."""
    weights: list[float] = msgspec.field(default_factory=list)
    """Of rollout: each word's share of the attention, 1 in all."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about each text of a request."""

    method: Method = "integrated_gradients"
    top_k: int | None = None
    """Labels to explain, the best first; None: all."""
    side: Side = "right"
    """Where a text that is too long was cut."""


def question(explain: bool | ExplainOptions, top_k: int | None, side: Side) -> Question | None:
    """What a request asks; None: nothing is to be explained."""
    if not explain:
        return None
    options = explain if isinstance(explain, ExplainOptions) else ExplainOptions()
    return Question(options.method, top_k, side)
