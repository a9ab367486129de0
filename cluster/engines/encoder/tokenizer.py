"""Texts to token ids with a fast tokenizer; no threads and no queue of its own."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from cluster.engines.encoder.jobs import TokenIds
from cluster.errors import ConfigError, InvalidRequestError

PROBE = "a probe of the special tokens"


class TextTokenizer:
    """Adds a model's special tokens around each text and cuts it to the model's length.

    Args:
        tokenizer: A fast tokenizer of transformers.
        max_tokens: The longest text, special tokens included.

    Raises:
        ConfigError: the tokenizer is not a fast one, or puts special tokens inside a text.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json)"
            )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._prefix, self._suffix = self._special_ids()
        self.max_tokens = max_tokens
        self._room = max_tokens - len(self._prefix) - len(self._suffix)

    def encode(self, texts: Sequence[str], first: int, truncate: bool) -> list[TokenIds]:
        """The ids of each text, special tokens included.

        Args:
            texts: Unicode texts; the empty one has its special tokens.
            first: Where ``texts[0]`` stands in the request, for messages.
            truncate: Cut texts that are too long at their end.

        Raises:
            InvalidRequestError: a text is too long and ``truncate`` is off.
        """
        bodies = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows: list[list[int]] = []
        for index, body in enumerate(bodies, first):
            ids = body.ids
            if len(ids) > self._room:
                if not truncate:
                    raise self.too_long(index, len(ids) + self.max_tokens - self._room)
                ids = ids[: self._room]
            rows.append([*self._prefix, *ids, *self._suffix])
        return split_rows(rows)

    def too_long(self, index: int, num_tokens: int) -> InvalidRequestError:
        """The error for the ``index``-th text of a request."""
        return InvalidRequestError(
            f"input[{index}] has {num_tokens} tokens; the model takes {self.max_tokens} "
            "(truncate: true cuts it)",
            param="input",
        )

    def _special_ids(self) -> tuple[list[int], list[int]]:
        bare = self._backend.encode(PROBE, add_special_tokens=False).ids
        full = self._backend.encode(PROBE).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ConfigError("the tokenizer puts special tokens inside a text; none such is supported")


def split_rows(rows: Sequence[Sequence[int]]) -> list[TokenIds]:
    """One array for each row; all share one buffer, which costs less than many small arrays."""
    ends = np.cumsum([len(row) for row in rows])
    flat = np.fromiter(chain.from_iterable(rows), np.int64, int(ends[-1]) if rows else 0)
    return np.split(flat, ends[:-1]) if rows else []
