"""What passes through the engine: a job (one request's texts) and what comes of it.

A job belongs to one stage at a time (loop → tokenizer thread → queue → model thread → loop), and
only that stage writes to it; ``future`` is touched on the event loop alone.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.config import ClassifierTask

TokenIds = NDArray[np.int64]
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds."""

    tokenize_s: float
    queue_s: float
    """Between tokenizing and the answer, the time in which no batch with a text of it ran."""
    compute_s: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """The answer to a request."""

    rows: Rows
    """[texts, labels] scores or [texts, hidden] embeddings, in the order of the request."""
    num_tokens: int
    """Tokens that were computed, special ones included."""
    timings: Timings


@dataclass(slots=True, eq=False)
class Job:
    """One admitted request and its progress."""

    task: ClassifierTask
    texts: Sequence[str]
    """Empty when the caller gave token ids."""
    truncate: bool
    future: asyncio.Future[Encoded]
    begun_s: float
    ids: list[TokenIds] = field(default_factory=list)
    """Each text's token ids with the special tokens; complete once the job is in the queue."""
    expected_tokens: int = 0
    """The guess that stands for its tokens while it is tokenized."""
    tokenized_s: float = 0.0
    compute_s: float = 0.0
    num_done: int = 0
    rows: Rows | None = None
    abandoned: bool = False
    """The client has left."""

    def encoded(self, now_s: float) -> Encoded:
        """The answer of a job whose texts are all done."""
        assert self.rows is not None
        tokenize_s = self.tokenized_s - self.begun_s
        queue_s = max(0.0, now_s - self.tokenized_s - self.compute_s)
        num_tokens = sum(map(len, self.ids))
        return Encoded(self.rows, num_tokens, Timings(tokenize_s, queue_s, self.compute_s))
