"""Inputs and outputs of an encoder network."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Text = str | tuple[str, str]
"""A text, or a text and its pair."""
TokenIds = NDArray[np.int64]
"""Token ids of one input row. A token of the second segment (token type 1) is stored as ``~id``."""
ModelInput = Text | TokenIds
Rows = NDArray[np.float32]
Side = Literal["left", "right"]
"""Side on which a long text is cut."""
Merge = Literal["mean", "max"]
"""Merging of a text's windows into one result."""
Head = Literal[
    "classify",
    "logits",
    "embed",
    "embed-unnormalized",
    "embed-tokens",
    "embed-sparse",
    "token-classification",
    "fill-mask",
]
"""Result that a model computes for each input row; see ``EncoderModel.run``."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """Treatment of texts that differs from the model's usual one."""

    max_tokens: int | None = None
    """Limit on a row, special tokens included. None: the model's length."""
    max_first_tokens: int | None = None
    """Limit on the tokens read of a pair's first text. None: as many as fit."""
    max_pair_tokens: int | None = None
    """Limit on the tokens read of a pair's second text. None: as many as fit."""
    special_tokens: bool = True
    """False leaves out the special tokens."""


class EncoderModel(Protocol):
    """Network that computes batches."""

    padding: float
    """Padding computed since the model was loaded, in token equivalents."""

    def run(self, head: Head, ids: Sequence[TokenIds]) -> Rows | list[Rows]:
        """Return one result per row of ``ids``, which is sorted by ascending length.

        ``classify``: scores [texts, labels]; ``logits``: the same before the activation.
        ``embed``: vectors [texts, width]; ``embed-unnormalized``: the same as pooled.
        ``embed-tokens``: per text, vectors [tokens, width]. ``embed-sparse``: per text, [terms, 2],
        token ids and weights. ``token-classification``: per text, scores [tokens, labels].
        ``fill-mask``: per text, [masks, 2 * candidates], the candidates' ids followed by their
        scores, best first.
        A text's result does not depend on the other texts of the batch, up to rounding.
        """


def num_chars(text: Text) -> int:
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def split_by_length(rows: Rows, ids: Sequence[TokenIds]) -> list[Rows]:
    """Return the rows of each text from rows of all tokens end to end, which may be padded."""
    ends = np.cumsum([len(text) for text in ids])
    return np.split(rows[: ends[-1]], ends[:-1])
