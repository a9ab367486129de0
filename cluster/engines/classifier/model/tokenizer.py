"""Token ids of texts, made by a fast tokenizer; starts no threads."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from cluster.engines.classifier.model.template import Template, cut_ids, find_template, fit_pair
from cluster.engines.classifier.model.types import Side, Text, TokenIds, Tokenization
from cluster.errors import ConfigError, ContextLengthError, InvalidRequestError

USUAL = Tokenization()
"""Tokenization of requests that ask for nothing else."""


class TextReader(Protocol):
    """Maker of a model's input rows from texts; called by several tokenizer threads at once."""

    @property
    def max_tokens_per_text(self) -> float:
        """Upper bound of the tokens made of one text; infinite if a text may have several rows."""

    def read(self, texts: Sequence[Text], first: int) -> list[TokenIds]:
        """Return one or more rows per text, special tokens included.

        Args:
            texts: Consecutive texts of a request, or of several that share the reader.
            first: Index of ``texts[0]`` in its request, for error messages.

        Raises:
            InvalidRequestError: A text is too long, or is a pair and the model takes none.
        """


class TextTokenizer:
    """Tokenizer that adds a model's special tokens and cuts texts to the model's length.

    Args:
        tokenizer: A fast tokenizer of transformers.
        max_tokens: Length of the longest text, special tokens included.
        marks_pair: True if the model has a token type for the second segment.

    Raises:
        ConfigError: The tokenizer is not a fast one, or puts special tokens inside a text.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, marks_pair: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise ConfigError(f"{kind} is not a fast tokenizer; tokenizer.json is required")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        single = find_template(self._backend, 1)
        if single is None:
            raise ConfigError("the tokenizer puts special tokens inside a text: not supported")
        self._single = single
        self._pair = find_template(self._backend, 2, marks_pair)
        self.max_tokens = max_tokens
        sides: tuple[Side | None, ...] = (None, "left", "right")
        self.readers = {side: PlainReader(self, side) for side in sides}
        """Shared readers by the side on which they cut long texts; None refuses them."""
        self.mask_token: str | None = tokenizer.mask_token
        self.mask_id: int = -1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        """Token id of the mask; -1 if the tokenizer has none."""
        self.pad_id: int = tokenizer.pad_token_id or 0
        self.unknown_id: int | None = tokenizer.unk_token_id
        self.has_subwords = bool(getattr(self._backend.model, "continuing_subword_prefix", None))
        """True if a token's own text shows that it continues a word."""

    def encode(
        self,
        texts: Sequence[Text],
        first: int,
        side: Side | None,
        tokenization: Tokenization = USUAL,
    ) -> list[TokenIds]:
        """Return the input row of each text; see ``TextReader.read``.

        Args:
            texts: Unicode texts; an empty one consists of special tokens.
            first: Index of ``texts[0]`` in its request, for error messages.
            side: Side on which long texts are cut; None refuses them. In a pair, the longer text is
                cut first.
            tokenization: Limits, applied before ``side``, and whether to add special tokens.

        Raises:
            InvalidRequestError: As ``TextReader.read``, or a row would have no tokens.
        """
        bodies = iter(self._backend.encode_batch_fast(flatten(texts), add_special_tokens=False))
        rows: list[list[int]] = []
        for index, text in enumerate(texts, first):
            ids, pair = next(bodies).ids, []
            if not isinstance(text, str):
                ids = ids[: tokenization.max_first_tokens]
                pair = next(bodies).ids[: tokenization.max_pair_tokens]
            template = self.template(text, tokenization.special_tokens)
            room = self.room(template, tokenization.max_tokens)
            if len(ids) + len(pair) > room:
                if side is None:
                    num_tokens = len(ids) + len(pair) + template.num_tokens
                    raise self.too_long_error(index, num_tokens)
                kept, kept_pair = fit_pair(len(ids), len(pair), room)
                ids, pair = cut_ids(ids, kept, side), cut_ids(pair, kept_pair, side)
            rows.append(template.join(ids, pair))
            if not rows[-1]:
                raise no_tokens_error(index)
        return split_rows(rows)

    def encode_shortest(self) -> TokenIds:
        """Return the shortest input: the special tokens, or padding if there are none."""
        return np.array(self._single.join([]) or [self.pad_id], np.int64)

    def encode_with_offsets(self, texts: Sequence[Text]) -> list[Any]:
        """Return a ``tokenizers.Encoding`` without special tokens for each text and each pair."""
        return list(self._backend.encode_batch(flatten(texts), add_special_tokens=False))

    def template(self, text: Text, special_tokens: bool = True) -> Template:
        """Return the special tokens around ``text``.

        Raises:
            InvalidRequestError: It is a pair and the model takes none.
        """
        template = self._single if isinstance(text, str) else self._pair
        if template is None:
            raise InvalidRequestError("this model takes no pairs of texts", param="input")
        return template if special_tokens else Template((), (), (), template.marks_pair)

    def room(self, template: Template, max_tokens: int | None) -> int:
        """Return how many tokens fit between the special tokens of a row.

        Raises:
            InvalidRequestError: The limit leaves no room for the special tokens.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        room = limit - template.num_tokens
        if room < 0:
            message = (
                f"truncate_prompt_tokens is {max_tokens}; the special tokens alone are "
                f"{template.num_tokens}"
            )
            raise InvalidRequestError(message, param="truncate_prompt_tokens")
        return room

    @property
    def has_chat_template(self) -> bool:
        """True if the model defines how a conversation becomes a text."""
        return bool(self._tokenizer.chat_template)

    def render_chat(self, messages: Sequence[Any], **options: Any) -> str:
        """Return a conversation as text by the model's template; raise if the template fails."""
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def encode_plain(self, text: str, special_tokens: bool = True) -> Any:
        """Return the ``tokenizers.Encoding`` of a text of any length."""
        # Unlike `encode`, `encode_batch` releases the GIL.
        return self._backend.encode_batch([text], add_special_tokens=special_tokens)[0]

    def decode(self, token: int) -> str:
        return self.decode_ids([token])

    def decode_ids(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def too_long_error(self, index: int, num_tokens: int) -> ContextLengthError:
        return ContextLengthError(
            f"input[{index}] has {num_tokens} tokens; the model takes {self.max_tokens}. "
            "Shorten it or set `truncate`.",
            param="input",
        )


@dataclass(frozen=True, slots=True, eq=False)
class PlainReader:
    """``TextReader`` that makes one row per text; for the fields, see ``TextTokenizer.encode``."""

    tokenizer: TextTokenizer
    side: Side | None
    tokenization: Tokenization = USUAL

    @property
    def max_tokens_per_text(self) -> float:
        limit = self.tokenization.max_tokens
        return self.tokenizer.max_tokens if limit is None else limit

    def read(self, texts: Sequence[Text], first: int) -> list[TokenIds]:
        return self.tokenizer.encode(texts, first, self.side, self.tokenization)


def no_tokens_error(index: int) -> InvalidRequestError:
    message = f"input[{index}] has no tokens; set `add_special_tokens` or send a text"
    return InvalidRequestError(message, param="input")


def flatten(texts: Sequence[Text]) -> list[str]:
    """Return all texts, each pair as two."""
    return [part for text in texts for part in ((text,) if isinstance(text, str) else text)]


def split_rows(rows: Sequence[Sequence[int]]) -> list[TokenIds]:
    """Return an array per row; all share one buffer, which is cheaper than many small arrays."""
    ends = np.cumsum([len(row) for row in rows])
    flat = np.fromiter(chain.from_iterable(rows), np.int64, int(ends[-1]) if rows else 0)
    return np.split(flat, ends[:-1]) if rows else []
