"""Division of a document into passages: whole blocks of one section, up to a number of tokens."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.applications.chunks import best_end
from cluster.applications.knowledge.document import Block, Document


@dataclass(frozen=True, slots=True)
class Chunk:
    """Passage of a document, from character ``start`` up to but not including ``end``."""

    start: int
    end: int
    heading: tuple[str, ...]
    """Headings above it or at its beginning, outermost first."""
    context: tuple[str, ...]
    """Headings that its own text does not have."""
    page: int | None


class Tokens:
    """Positions of the tokens of a text.

    Args:
        starts: First character of each token, in order.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self._starts = starts

    def count(self, start: int, end: int) -> int:
        """Return the number of tokens that start in a part of the text."""
        return bisect_left(self._starts, end) - bisect_left(self._starts, start)

    def limit(self, start: int, max_tokens: int, end: int) -> int:
        """Return the end of the longest part from ``start`` with at most ``max_tokens`` tokens."""
        first = bisect_left(self._starts, start)
        if first + max_tokens >= len(self._starts):
            return end
        return min(end, max(start + 1, self._starts[first + max_tokens]))


def divide_document(document: Document, tokens: Tokens, max_tokens: int) -> list[Chunk]:
    """Return the passages of a document, in order.

    A passage has whole blocks of one section and page, as many as fit. A block that is too long
    alone is divided between sentences or words. A heading belongs to the passage below it.
    """
    chunks: list[Chunk] = []
    current: Chunk | None = None
    has_body = False
    for block in document.blocks:
        for piece in _fitting(document.text, block, tokens, max_tokens):
            if current is not None and _fits(current, piece, tokens, max_tokens, has_body):
                current = replace(current, end=piece.end, heading=piece.heading)
            else:
                if current is not None:
                    chunks.append(current)
                current = _begin(piece)
                has_body = False
            has_body |= piece.level == 0
    return chunks if current is None else [*chunks, current]


def _begin(block: Block) -> Chunk:
    context = block.heading[:-1] if block.level else block.heading
    return Chunk(block.start, block.end, block.heading, context, block.page)


def _fits(current: Chunk, block: Block, tokens: Tokens, max_tokens: int, has_body: bool) -> bool:
    """Return True if a block belongs to the passage before it, or below its headings."""
    if has_body:
        is_same_section = block.level == 0 and block.heading == current.heading
    else:
        is_same_section = block.heading[: len(current.heading)] == current.heading
    return (
        is_same_section
        and block.page == current.page
        and tokens.count(current.start, block.end) <= max_tokens
    )


def _fitting(text: str, block: Block, tokens: Tokens, max_tokens: int) -> Iterator[Block]:
    """Yield a block, in parts if it has too many tokens."""
    start = block.start
    while tokens.count(start, block.end) > max_tokens:
        limit = tokens.limit(start, max_tokens, block.end)
        end = best_end(text, start, limit)
        if text[start:end].strip():
            yield replace(block, start=start, end=start + len(text[start:end].rstrip()))
        start = end
        while start < block.end and text[start].isspace():
            start += 1
    if start < block.end:
        yield replace(block, start=start)
