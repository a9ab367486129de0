"""Data of one request on its way through the engine.

A job belongs to one stage at a time (event loop → tokenizer thread → queue → model thread → event
loop). Only that stage writes to it, and only the event loop touches ``future``.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.engines.classifier.model.tokenizer import TextReader
from cluster.engines.classifier.model.types import (
    Head,
    Merge,
    Rows,
    Side,
    Text,
    TokenIds,
    Tokenization,
)
from cluster.engines.classifier.model.windows import Window, merge_rows


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """Requested result, and treatment of long texts."""

    head: Head
    side: Side | None = None
    """Side on which long texts are cut. None: they are refused, unless ``stride`` is set."""
    stride: int | None = None
    """Overlap of neighbouring windows in tokens. None: one row per text."""
    with_offsets: bool = False
    """True if the result needs the character offsets of the tokens."""
    tokenization: Tokenization | None = None
    """Treatment of the texts; None: the usual one, which requests share."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Durations of a request's phases, in seconds."""

    tokenize_s: float
    queue_s: float
    """Time after tokenizing in which no batch with a text of the request ran."""
    compute_s: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """Results for the texts of one request, in order."""

    rows: Rows | list[Rows]
    """[texts, width], or per text [tokens, width]; one row per window if there are windows."""
    lengths: Sequence[int]
    """Tokens of each input row, special tokens included."""
    timings: Timings
    windows: Sequence[Sequence[Window]] = ()
    """Windows of each text; empty if texts were not read in windows."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def rows_by_text(self, merge: Merge) -> Rows:
        """Return [texts, width] with the windows of each text merged."""
        return self.merge(np.asarray(self.rows), merge)

    def merge(self, rows: Rows, merge: Merge) -> Rows:
        """Return [texts, width] of rows that have one row per window."""
        return merge_rows(rows, self.windows, merge) if self.windows else rows


@dataclass(slots=True, eq=False)
class Job:
    """One admitted request and its progress."""

    head: Head
    texts: Sequence[Text]
    """Empty if the client sent token ids."""
    reader: TextReader
    """Tokenizes the texts. Jobs that share a reader are tokenized together."""
    future: asyncio.Future[Encoded]
    admitted_s: float
    ids: list[TokenIds] = field(default_factory=list)
    """Input rows of the model; complete once the job is in the queue."""
    num_tokenized: int = 0
    """Number of texts whose rows are in ``ids``."""
    estimated_tokens: int = 0
    """Tokens reserved in the queue until the job is tokenized."""
    tokenized_s: float = 0.0
    compute_s: float = 0.0
    num_done: int = 0
    rows: Rows | list[Rows] | None = None
    cancelled: bool = False
    """True after the client disconnected."""

    def to_encoded(self, now_s: float) -> Encoded:
        """Return the result of a job whose rows are all computed."""
        assert self.rows is not None
        tokenize_s = self.tokenized_s - self.admitted_s
        queue_s = max(0.0, now_s - self.tokenized_s - self.compute_s)
        lengths = [len(row) for row in self.ids]
        return Encoded(self.rows, lengths, Timings(tokenize_s, queue_s, self.compute_s))
