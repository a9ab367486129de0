"""Text of a document with its structure, as the readers return it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pydantic takes the processes of the readers half a second
    from cluster.tasks.knowledge import MediaType

MAX_HEADINGS = 6
MAX_HEADING_CHARS = 200


@dataclass(frozen=True, slots=True)
class Block:
    """Heading, paragraph, list item, table or code, from character ``start`` up to ``end``."""

    start: int
    end: int
    heading: tuple[str, ...] = ()
    """Headings above it, outermost first."""
    page: int | None = None
    level: int = 0
    """Level of a heading; 0 for other blocks."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text of a file and its blocks, in order."""

    type: "MediaType"
    text: str
    blocks: tuple[Block, ...]
    num_pages: int | None = None


@dataclass(slots=True)
class Outline:
    """Headings above the present place of a document."""

    _headings: list[tuple[int, str]] = field(default_factory=list)

    def enter(self, level: int, title: str) -> None:
        """Start the section of a heading."""
        title = " ".join(title.split())[:MAX_HEADING_CHARS]
        self._headings = [pair for pair in self._headings if pair[0] < level]
        if title and len(self._headings) < MAX_HEADINGS:
            self._headings.append((level, title))

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(title for _, title in self._headings)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a block, before the text of the document is joined."""

    text: str
    level: int = 0
    page: int | None = None


def join_pieces(
    type_: "MediaType", pieces: Iterable[Piece], num_pages: int | None = None
) -> Document:
    """Return the document whose text is all pieces, with blank lines between."""
    outline, parts, blocks = Outline(), [], []
    start = 0
    for piece in pieces:
        text = piece.text.strip()
        if not text:
            continue
        if piece.level:
            outline.enter(piece.level, text)
        end = start + len(text)
        blocks.append(Block(start, end, outline.path, piece.page, piece.level))
        parts.append(text)
        start = end + 2
    return Document(type_, "\n\n".join(parts), tuple(blocks), num_pages)
