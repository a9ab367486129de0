"""Division of a text into segments to translate and parts to keep.

Parts joined in order are the text. In Markdown, fenced code, HTML, rules and the marks of headings,
lists, quotes and tables are kept; code spans and link targets inside of a segment become numbered
placeholders.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_MARK = re.compile(
    r"^(?:\s{0,3}>\s?|\s*(?:[-*+]|\d{1,9}[.)])\s+(?:\[[ xX]\]\s+)?|\s{0,3}#{1,6}\s+)+"
)
_KEPT_LINE = re.compile(r"^\s*(?:[-*_=]\s*){3,}$|^\s*<[^>]*>\s*$|^(?: {4}|\t)")
_RULE_CHARS = frozenset("|:- \t\r\n")  # of the line below a table's head
# Code spans, link targets, tags, URLs. No alternative can match in two ways, so time is linear.
_PROTECTED = re.compile(
    r"(`{1,3})[^`\n]+\1|(?<=\])\([^()\s]*\)|<[^<>\s][^<>]*>|https?://[^\s()<>]+"
)
_CELL = re.compile(r"(?<!\\)\|")
_PLACEHOLDER = re.compile(r"\[\[(\d+)\]\]")


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a text; ``translates`` is False for a part that is kept."""

    text: str
    translates: bool


def paragraphs(text: str) -> Iterator[Segment]:
    """Yield the paragraphs of a plain text, and what separates them."""
    start = 0
    for found in _PARAGRAPH.finditer(text):
        yield from _padded(text[start : found.start()])
        yield Segment(found[0], False)
        start = found.end()
    yield from _padded(text[start:])


def blocks(text: str) -> Iterator[Segment]:
    """Yield the translatable parts of a Markdown text, and what is between them."""
    kept: list[str] = []
    for segment in _blocks(text):
        if not segment.translates:
            kept.append(segment.text)
            continue
        if kept:
            yield Segment("".join(kept), False)
            kept.clear()
        yield segment
    if kept:
        yield Segment("".join(kept), False)


def _blocks(text: str) -> Iterator[Segment]:
    fence = ""
    prose: list[str] = []
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        is_prose = not (fence or found or _is_structure(line))
        if not is_prose and prose:
            yield from _padded("".join(prose))
            prose.clear()
        if found and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else found[1]
            yield Segment(line, False)
        elif fence or _is_kept(line):
            yield Segment(line, False)
        elif line.lstrip().startswith("|"):
            yield from _cells(line)
        elif mark := _MARK.match(line):
            yield Segment(mark[0], False)
            yield from _padded(line[mark.end() :])
        else:
            prose.append(line)
    yield from _padded("".join(prose))


def _is_structure(line: str) -> bool:
    return bool(_is_kept(line) or _MARK.match(line) or line.lstrip().startswith("|"))


def _is_kept(line: str) -> bool:
    is_rule = "|" in line and "-" in line and _RULE_CHARS.issuperset(line)
    return not line.strip() or is_rule or _KEPT_LINE.match(line) is not None


def _cells(line: str) -> Iterator[Segment]:
    start = 0
    for found in _CELL.finditer(line):
        yield from _padded(line[start : found.start()])
        yield Segment("|", False)
        start = found.end()
    yield from _padded(line[start:])


def _padded(text: str) -> Iterator[Segment]:
    """Yield a segment, with the white space around it as parts to keep."""
    content = text.strip()
    if not content or not any(char.isalpha() for char in content):
        if text:
            yield Segment(text, False)
        return
    start = text.index(content)
    if start:
        yield Segment(text[:start], False)
    yield Segment(content, True)
    if rest := text[start + len(content) :]:
        yield Segment(rest, False)


def protect(text: str) -> tuple[str, list[str]]:
    """Return the text with placeholders, and what they stand for."""
    kept: list[str] = []

    def replace(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"[[{len(kept)}]]"

    if _PLACEHOLDER.search(text):  # ambiguous
        return text, []
    return _PROTECTED.sub(replace, text), kept


def restore(text: str, kept: list[str]) -> str | None:
    """Return the text with the originals; None if a placeholder is missing or occurs twice."""
    found = sorted(int(number) for number in _PLACEHOLDER.findall(text))
    if found != list(range(1, len(kept) + 1)):
        return None
    return _PLACEHOLDER.sub(lambda match: kept[int(match[1]) - 1], text)


def around_protected(text: str) -> Iterator[Segment]:
    """Yield the parts between protected ones, which are kept."""
    start = 0
    for found in _PROTECTED.finditer(text):
        yield from _padded(text[start : found.start()])
        yield Segment(found[0], False)
        start = found.end()
    yield from _padded(text[start:])
