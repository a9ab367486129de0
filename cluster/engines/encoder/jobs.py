"""What passes through the engine: a job (one request's texts) and what comes of it.

A job belongs to one stage at a time (loop → tokenizer thread → queue → model thread → loop), and
only that stage writes to it; ``future`` is touched on the event loop alone. A reader is called on
the tokenizers' threads, perhaps on two at once.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.config import ClassifierTask

Text = str | tuple[str, str]
"""A text, or a text and its pair."""
TokenIds = NDArray[np.int64]
"""The tokens of one row of the model's input; a token of the second segment (type 1) is ``~id``."""
Rows = NDArray[np.float32]


class TextReader(Protocol):
    """Makes token ids of texts."""

    @property
    def most_tokens(self) -> float:
        """That it makes of one text; infinite where a text may have several rows."""

    def read(self, texts: Sequence[Text], first: int) -> list[TokenIds]:
        """The rows of each text, one or more, special tokens included.

        Args:
            texts: The next texts of a request, or of several that share the reader.
            first: Where ``texts[0]`` stands in its request, for messages.

        Raises:
            InvalidRequestError: a text is too long or of the wrong kind.
        """


def num_chars(text: Text) -> int:
    """Characters, those of the pair included."""
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


class EncoderModel(Protocol):
    """One forward pass over the texts of a batch."""

    padding: float
    """What was computed of no token since the beginning, as the number of tokens it would make."""

    def run(self, task: ClassifierTask, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        """What ``task`` asks for, in the order of ``ids``, which ascend in length.

        ``classify``: scores [texts, labels]. ``embed``: vectors [texts, width].
        ``token-classification``: for each text, scores [its tokens, labels]. ``fill-mask``: for
        each text [its masks, 2 * candidates], the ids and then their scores, the best first.
        What comes of a text depends on it alone, up to rounding.
        """


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds."""

    tokenize_s: float
    queue_s: float
    """Between tokenizing and the answer, the time in which no batch with a text of it ran."""
    compute_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text that the model read at once."""

    first: int
    """Which of the text's tokens it begins with."""
    lead: int
    """How many tokens stand before it in its row."""
    spans: NDArray[np.int64]
    """[tokens, 2]: the characters of each of its tokens, from and up to."""
    continues: NDArray[np.bool_]
    """[tokens]: whether a token continues the word of the one before."""

    @property
    def start(self) -> int:
        """The first character."""
        return int(self.spans[0, 0]) if len(self.spans) else 0

    @property
    def end(self) -> int:
        """The character after the last one."""
        return int(self.spans[-1, 1]) if len(self.spans) else 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the model gave for the texts of a request, in order."""

    rows: Rows | list[Rows]
    """[texts, width], or for each text [its tokens, width]; windows in place of texts, if any."""
    lengths: Sequence[int]
    """The tokens of each row's input, special ones included."""
    timings: Timings
    windows: Sequence[Sequence[Window]] = ()
    """Each text's windows, where it was read in windows."""

    @property
    def num_tokens(self) -> int:
        """Tokens that were computed."""
        return sum(self.lengths)


@dataclass(slots=True, eq=False)
class Job:
    """One admitted request and its progress."""

    task: ClassifierTask
    texts: Sequence[Text]
    """Empty when the caller gave token ids."""
    reader: TextReader
    """Jobs with the same one are read together."""
    future: asyncio.Future[Encoded]
    begun_s: float
    ids: list[TokenIds] = field(default_factory=list)
    """The model's input by row; complete once the job is in the queue."""
    num_read: int = 0
    """Texts whose rows are in ``ids``."""
    expected_tokens: int = 0
    """The guess that stands for its tokens while it is tokenized."""
    tokenized_s: float = 0.0
    compute_s: float = 0.0
    num_done: int = 0
    rows: Rows | list[Rows] | None = None
    abandoned: bool = False
    """The client has left."""

    def encoded(self, now_s: float) -> Encoded:
        """The answer of a job whose texts are all done."""
        assert self.rows is not None
        tokenize_s = self.tokenized_s - self.begun_s
        queue_s = max(0.0, now_s - self.tokenized_s - self.compute_s)
        lengths = [len(row) for row in self.ids]
        return Encoded(self.rows, lengths, Timings(tokenize_s, queue_s, self.compute_s))
