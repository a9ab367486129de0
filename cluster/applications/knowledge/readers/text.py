"""Plain text and Markdown. Positions are those in the file's text; time is linear in its size."""

import codecs
import re
from collections.abc import Iterator

from cluster.applications.knowledge.document import Block, Document, Outline
from cluster.errors import InvalidRequestError

_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*))?$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_NOT_PROSE = (">", "|", "#", "-", "*", "+", "<")
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(content: bytes) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        InvalidRequestError: It is neither, or has NUL characters, as binary files do.
    """
    encoding = "utf-16" if content.startswith(_UTF_16_MARKS) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"The file is not text in UTF-8: byte {error.start} is invalid.", param="file"
        ) from None
    if "\0" in text:
        raise InvalidRequestError("The file is not text: it has NUL characters.", param="file")
    return text


def read_text(text: str) -> Document:
    """Return the paragraphs of a plain text."""
    blocks = tuple(Block(start, end) for start, end in _paragraphs(text))
    return Document("text", text, blocks)


def read_markdown(text: str) -> Document:
    """Return the headings of a Markdown text, and the blocks below them."""
    outline = Outline()
    blocks = []
    for start, end, level in _markdown_parts(text):
        if level:
            outline.enter(level, _title(text[start:end]))
        blocks.append(Block(start, end, outline.path, level=level))
    return Document("markdown", text, tuple(blocks))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield start and content of each line."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start)
        end = len(text) if newline < 0 else newline
        yield start, text[start:end]
        start = end + 1


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    first, last = -1, -1
    for start, line in _lines(text):
        if line.strip():
            first = start if first < 0 else first
            last = start + len(line.rstrip())
        elif first >= 0:
            yield first, last
            first = -1
    if first >= 0:
        yield first, last


def _markdown_parts(text: str) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and level of each heading, and of what blank lines separate (level 0)."""
    first, last, fence, num_lines = -1, -1, "", 0
    for start, line in _lines(text):
        content_end = start + len(line.rstrip())
        if fence:
            last = max(content_end, last)
            if _closes(line, fence):
                fence = ""
            continue
        heading = _HEADING.match(line)
        underline = _UNDERLINE.match(line) if num_lines == 1 else None
        if first >= 0 and underline and not text[first:last].lstrip().startswith(_NOT_PROSE):
            yield first, content_end, 1 if underline[1][0] == "=" else 2
            first, num_lines = -1, 0
            continue
        if first >= 0 and (heading or not line.strip()):
            yield first, last, 0
            first, num_lines = -1, 0
        if heading:
            yield start, content_end, len(heading[1])
        elif line.strip():
            first = start if first < 0 else first
            last, num_lines = content_end, num_lines + 1
            if mark := _FENCE.match(line):
                fence = mark[1]
    if first >= 0:
        yield first, last, 0


def _closes(line: str, fence: str) -> bool:
    content = line.strip()
    return len(content) >= len(fence) and set(content) == {fence[0]}


def _title(heading: str) -> str:
    line = heading.strip().splitlines()[0]
    return line.strip().lstrip("#").strip().rstrip("#").strip()
