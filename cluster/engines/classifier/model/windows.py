"""Texts with the places of their tokens, and long ones in windows that overlap.

A ``WindowReader`` belongs to one request; ``merge_rows`` and ``merge_tokens`` put together again
what the model gave for its windows. Knows no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.engines.classifier.model.template import Side
from cluster.engines.classifier.model.tokenizer import TextTokenizer, split_rows
from cluster.engines.classifier.model.types import Rows, Text, TokenIds
from cluster.errors import InvalidRequestError

Merge = Literal["mean", "max"]


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a text that the model reads in one row."""

    first: int
    """Index of its first token within the text."""
    lead: int
    """Number of tokens before it in its row."""
    spans: NDArray[np.int64]
    """Character offsets of the tokens, end excluded, [tokens, 2]."""
    continues: NDArray[np.bool_]
    """True where a token continues the previous token's word, [tokens]."""

    @property
    def start(self) -> int:
        """Offset of the first character."""
        return int(self.spans[0, 0]) if len(self.spans) else 0

    @property
    def end(self) -> int:
        """Offset after the last character."""
        return int(self.spans[-1, 1]) if len(self.spans) else 0


class WindowReader:
    """Reads the texts of one request, each as one window or as several.

    Args:
        tokenizer: The model's.
        side: Where a text that is too long is cut; None refuses it, unless there is a stride.
        stride: How many tokens neighbouring windows share; None: one window for each text.
        max_pair_tokens: The tokens of a pair's second text that are read; None: all.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        side: Side | None,
        stride: int | None,
        max_pair_tokens: int | None = None,
    ) -> None:
        self.max_tokens_per_text = float(tokenizer.max_tokens) if stride is None else float("inf")
        self._tokenizer = tokenizer
        self._side = side
        self._stride = stride
        self._max_pair_tokens = max_pair_tokens
        self.windows: list[list[Window]] = []
        """By text, in the order of the request."""

    def read(self, texts: Sequence[Text], first: int) -> list[TokenIds]:
        """See ``TextReader``."""
        encodings = iter(self._tokenizer.locate(texts))
        rows: list[list[int]] = []
        for index, text in enumerate(texts, first):
            if isinstance(text, str):
                rows += self._text(index, text, next(encodings))
            else:
                rows += self._pair(index, text, next(encodings).ids, next(encodings))
        return split_rows(rows)

    def _text(self, index: int, text: str, body: Any) -> list[list[int]]:
        template = self._tokenizer.template(text)
        pieces = self._pieces(index, len(body.ids), self._room(template.num_tokens))
        self._note(text, body, pieces, len(template.prefix))
        return [template.join(body.ids[piece]) for piece in pieces]

    def _pair(
        self, index: int, text: tuple[str, str], head: list[int], body: Any
    ) -> list[list[int]]:
        """The windows are cut from the pair; each has the first text whole."""
        template = self._tokenizer.template(text)
        limit = self._room(template.num_tokens) // 2  # so that windows do not multiply the tokens
        if len(head) > limit:
            raise InvalidRequestError(
                f"the first text of input[{index}] has {len(head)} tokens; beside windows of its "
                f"pair it may have {limit}",
                param="input",
            )
        room = self._room(template.num_tokens) - len(head)
        pieces = self._pieces(index, len(body.ids[: self._max_pair_tokens]), room)
        self._note(text[1], body, pieces, len(template.prefix) + len(head) + len(template.middle))
        return [template.join(head, body.ids[piece]) for piece in pieces]

    def _room(self, num_special: int) -> int:
        return self._tokenizer.max_tokens - num_special

    def _pieces(self, index: int, length: int, room: int) -> list[slice]:
        if length <= room:
            return [slice(0, length)]
        if self._stride is not None:
            return list(_overlapping(length, room, self._stride))
        if self._side is None:
            special = self._tokenizer.max_tokens - room
            raise self._tokenizer.too_long(index, length + special)
        return [slice(0, room) if self._side == "right" else slice(length - room, length)]

    def _note(self, text: str, body: Any, pieces: Sequence[slice], lead: int) -> None:
        spans = np.array(body.offsets, np.int64).reshape(-1, 2)
        continues = self._continues(text, body)
        self.windows.append([Window(p.start, lead, spans[p], continues[p]) for p in pieces])

    def _continues(self, text: str, body: Any) -> NDArray[np.bool_]:
        """Which tokens continue the word of the one before, as transformers' pipeline decides it.

        Where tokens do not show it, all that no blank precedes do.
        """
        unknown, marked = self._tokenizer.unknown_id, self._tokenizer.has_subwords
        return np.array(
            [
                number != unknown
                and (
                    len(token) != end - start
                    if marked
                    else start > 0 and " " not in text[start - 1 : start + 1]
                )
                for number, token, (start, end) in zip(
                    body.ids, body.tokens, body.offsets, strict=True
                )
            ],
            np.bool_,
        )


def max_stride(tokenizer: TextTokenizer) -> int:
    """The largest overlap; a larger one would compute each token more than twice."""
    return (tokenizer.max_tokens - tokenizer.template("").num_tokens) // 2


def merge_rows(rows: Rows, windows: Sequence[Sequence[Window]], merge: Merge) -> Rows:
    """Return one row per text: the mean, or the maximum by column, of its windows' rows."""
    counts = np.array([len(of_text) for of_text in windows])
    if len(rows) == len(counts):
        return rows
    starts = np.cumsum(counts) - counts
    if merge == "max":
        return np.maximum.reduceat(rows, starts)
    return np.asarray(np.add.reduceat(rows, starts) / counts[:, None], np.float32)


def merge_tokens(rows: Sequence[Rows], windows: Sequence[Window], how: Merge) -> Rows:
    """The rows of one text's tokens [tokens, width]; those in several windows are merged."""
    first = windows[0].first
    parts = [
        (window.first - first, row[window.lead : window.lead + len(window.spans)])
        for row, window in zip(rows, windows, strict=True)
    ]
    if len(parts) == 1:
        return parts[0][1]
    at, last = parts[-1]
    merged = np.zeros((at + len(last), last.shape[1]), np.float32)
    counts = np.zeros((len(merged), 1), np.float32)
    for at, part in parts:
        place = merged[at : at + len(part)]
        np.copyto(place, np.maximum(place, part) if how == "max" else place + part)
        counts[at : at + len(part)] += 1
    return merged if how == "max" else np.asarray(merged / counts, np.float32)


def merge_spans(windows: Sequence[Window]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The spans of one text's tokens [tokens, 2], and which of them continue a word [tokens]."""
    if len(windows) == 1:
        return windows[0].spans, windows[0].continues
    new = [later.first - window.first for window, later in pairwise(windows)] + [None]
    spans = [window.spans[:count] for window, count in zip(windows, new, strict=True)]
    continues = [window.continues[:count] for window, count in zip(windows, new, strict=True)]
    return np.concatenate(spans), np.concatenate(continues)


def _overlapping(length: int, room: int, stride: int) -> Iterator[slice]:
    for start in range(0, length, room - stride):
        yield slice(start, min(start + room, length))
        if start + room >= length:
            return
