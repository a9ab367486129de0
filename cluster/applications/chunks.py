"""Division of texts: into parts of at most some tokens, and into sentences."""

import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.errors import ContextLengthError

COUNTED_CHARS = 60_000
"""Characters of a text that are counted in one call."""
MIN_BUDGET_TOKENS = 64
"""Smallest part that is worth a call."""
_MARGIN = 0.95  # of the estimated characters per part, because the density of tokens varies
_BREAKS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"[.!?…][\"'”’)\]]*\s+|[。！？]"),
    re.compile(r"\s+"),
)
"""Places to divide a text, the best ones first: paragraphs, lines, sentences, words."""
# Possessive, and only from the first mark, so that time is linear.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s)|[。！？]|\n\s*\n")

CountTokens = Callable[[Sequence[str]], Awaitable[list[int]]]
"""Returns the number of tokens of each text."""


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a text, from character ``start`` up to but not including ``end``."""

    start: int
    end: int
    tokens: int = 0

    def of(self, text: str) -> str:
        return text[self.start : self.end]


async def divide(text: str, budget_tokens: int, count: CountTokens) -> list[Part]:
    """Return consecutive parts of at most ``budget_tokens`` tokens, without blank ones.

    Raises:
        ContextLengthError: The budget is too small for any text.
    """
    if budget_tokens < MIN_BUDGET_TOKENS:
        raise ContextLengthError(
            f"The model's context leaves {budget_tokens} tokens for the text; at least "
            f"{MIN_BUDGET_TOKENS} are needed. Use fewer examples or tokens, or another model."
        )
    pieces = _counted(cut(text, Part(0, len(text)), COUNTED_CHARS), text)
    tokens = sum(await count([piece.of(text) for piece in pieces]))
    if tokens <= budget_tokens:
        return [_stripped(text, Part(0, len(text), tokens))]
    max_chars = max(1, int(len(text) * budget_tokens / tokens * _MARGIN))
    return await _fit(text, cut(text, Part(0, len(text)), max_chars), budget_tokens, count)


async def _fit(
    text: str, pieces: Sequence[Part], budget_tokens: int, count: CountTokens
) -> list[Part]:
    """Return the pieces, divided further where they exceed the budget."""
    pieces = _counted(pieces, text)
    counts = await count([piece.of(text) for piece in pieces])
    parts: list[Part] = []
    for piece, tokens in zip(pieces, counts, strict=True):
        size = piece.end - piece.start
        if tokens <= budget_tokens or size == 1:
            parts.append(Part(piece.start, piece.end, tokens))
        else:
            halves = cut(text, piece, (size + 1) // 2)
            parts += await _fit(text, halves, budget_tokens, count)
    return parts


def _counted(pieces: Sequence[Part], text: str) -> list[Part]:
    return [_stripped(text, piece) for piece in pieces if piece.of(text).strip()]


def _stripped(text: str, part: Part) -> Part:
    content = part.of(text)
    start = part.start + len(content) - len(content.lstrip())
    return Part(start, max(start, part.start + len(content.rstrip())), part.tokens)


def cut(text: str, part: Part, max_chars: int) -> list[Part]:
    """Return pieces of at most ``max_chars`` characters, divided at the best places."""
    pieces = []
    start = part.start
    while part.end - start > max_chars:
        end = best_end(text, start, start + max_chars)
        pieces.append(Part(start, end))
        start = end
    return [*pieces, Part(start, part.end)]


def best_end(text: str, start: int, limit: int) -> int:
    """Return the best place to divide a text, in the second half before ``limit``."""
    middle = (start + limit) // 2  # earlier breaks would make the parts too short
    for pattern in _BREAKS:
        ends = [found.end() for found in pattern.finditer(text, middle, limit)]
        if ends:
            return ends[-1]
    return limit


def sentences(text: str) -> Iterator[Part]:
    """Yield the sentences of a text, without white space around them."""
    start = 0
    for found in _SENTENCE_END.finditer(text):
        part = _stripped(text, Part(start, found.end()))
        start = found.end()
        if part.end > part.start:
            yield part
    part = _stripped(text, Part(start, len(text)))
    if part.end > part.start:
        yield part


def passages(text: str, max_chars: int) -> list[Part]:
    """Return parts of at most ``max_chars`` characters, divided at the best places."""
    return _counted(cut(text, Part(0, len(text)), max_chars), text)
