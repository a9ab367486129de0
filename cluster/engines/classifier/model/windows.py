"""Long texts in overlapping windows, tokens with character offsets, and merging of window results.

A ``WindowReader`` serves one request.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.engines.classifier.model.template import Template
from cluster.engines.classifier.model.tokenizer import (
    USUAL,
    TextTokenizer,
    no_tokens_error,
    split_rows,
)
from cluster.engines.classifier.model.types import (
    Merge,
    Rows,
    Side,
    Text,
    TokenIds,
    Tokenization,
)
from cluster.errors import InvalidRequestError


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


@dataclass(frozen=True, slots=True, eq=False)
class WindowReader:
    """``TextReader`` of one request that keeps offsets and reads long texts in windows."""

    tokenizer: TextTokenizer
    side: Side | None
    """Side on which long texts are cut; None refuses them, unless there is a stride."""
    stride: int | None
    """Overlap of neighbouring windows in tokens; None makes one window per text."""
    tokenization: Tokenization = USUAL
    """Limits on the texts, and whether to add special tokens."""
    windows: list[list[Window]] = field(default_factory=list, init=False)
    """Windows of each text read so far, in the order of the request."""

    @property
    def max_tokens_per_text(self) -> float:
        return self.tokenizer.max_tokens if self.stride is None else math.inf

    def read(self, texts: Sequence[Text], first: int) -> list[TokenIds]:
        encodings = iter(self.tokenizer.encode_with_offsets(texts))
        rows: list[list[int]] = []
        for index, text in enumerate(texts, first):
            if isinstance(text, str):
                rows += self._read_text(index, text, next(encodings))
            else:
                rows += self._read_pair(index, text, next(encodings).ids, next(encodings))
        return split_rows(rows)

    def _read_text(self, index: int, text: str, body: Any) -> list[list[int]]:
        template = self._template(text)
        pieces = self._cut(index, len(body.ids), self._room(template))
        self._add_windows(text, body, pieces, len(template.prefix))
        rows = [template.join(body.ids[piece]) for piece in pieces]
        if not rows[0]:
            raise no_tokens_error(index)
        return rows

    def _read_pair(
        self, index: int, text: tuple[str, str], head: list[int], body: Any
    ) -> list[list[int]]:
        """Cut the second text into windows; each row repeats the whole first text."""
        template = self._template(text)
        head = head[: self.tokenization.max_first_tokens]
        # A longer first text would leave windows so small that their number explodes.
        limit = self._room(template) // 2
        if len(head) > limit:
            message = (
                f"the first text of input[{index}] has {len(head)} tokens; with windows of its "
                f"pair it may have {limit}"
            )
            raise InvalidRequestError(message, param="input")
        room = self._room(template) - len(head)
        length = len(body.ids[: self.tokenization.max_pair_tokens])
        pieces = self._cut(index, length, room)
        lead = len(template.prefix) + len(head) + len(template.middle)
        self._add_windows(text[1], body, pieces, lead)
        return [template.join(head, body.ids[piece]) for piece in pieces]

    def _template(self, text: Text) -> Template:
        return self.tokenizer.template(text, self.tokenization.special_tokens)

    def _room(self, template: Template) -> int:
        return self.tokenizer.room(template, self.tokenization.max_tokens)

    def _cut(self, index: int, length: int, room: int) -> list[slice]:
        if length <= room:
            return [slice(0, length)]
        if self.stride is not None:
            return list(_overlapping(length, room, self.stride))
        if self.side is None:
            special = self.tokenizer.max_tokens - room
            raise self.tokenizer.too_long_error(index, length + special)
        return [slice(0, room) if self.side == "right" else slice(length - room, length)]

    def _add_windows(self, text: str, body: Any, pieces: Sequence[slice], lead: int) -> None:
        spans = np.array(body.offsets, np.int64).reshape(-1, 2)
        continues = self._continues_word(text, body)
        self.windows.append([Window(p.start, lead, spans[p], continues[p]) for p in pieces])

    def _continues_word(self, text: str, body: Any) -> NDArray[np.bool_]:
        """Return True for each token that continues a word, as transformers' pipeline decides it.

        If the tokens themselves do not show it, every token without a blank before it does.
        """
        unknown, has_subwords = self.tokenizer.unknown_id, self.tokenizer.has_subwords
        return np.array(
            [
                token_id != unknown
                and (
                    len(token) != end - start
                    if has_subwords
                    else start > 0 and " " not in text[start - 1 : start + 1]
                )
                for token_id, token, (start, end) in zip(
                    body.ids, body.tokens, body.offsets, strict=True
                )
            ],
            np.bool_,
        )


def max_stride(tokenizer: TextTokenizer) -> int:
    """Return the largest overlap at which no token is computed more than twice."""
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


def merge_tokens(rows: Sequence[Rows], windows: Sequence[Window], merge: Merge) -> Rows:
    """Return the rows of one text's tokens, [tokens, width], with overlaps merged."""
    first = windows[0].first
    parts = [
        (window.first - first, row[window.lead : window.lead + len(window.spans)])
        for row, window in zip(rows, windows, strict=True)
    ]
    if len(parts) == 1:
        return parts[0][1]
    start, last = parts[-1]
    merged = np.zeros((start + len(last), last.shape[1]), np.float32)
    counts = np.zeros((len(merged), 1), np.float32)
    for start, part in parts:
        target = merged[start : start + len(part)]
        np.copyto(target, np.maximum(target, part) if merge == "max" else target + part)
        counts[start : start + len(part)] += 1
    return merged if merge == "max" else np.asarray(merged / counts, np.float32)


def merge_spans(windows: Sequence[Window]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return ``spans`` and ``continues`` of one text's tokens, without the windows' overlaps."""
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
