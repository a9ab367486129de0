"""Division of a text into segments to translate and parts to keep.

Parts joined in order are the text. In Markdown, front matter, code, HTML, rules, definitions of
links, and the marks of headings, lists, quotes, notes and tables are kept; code spans and link
targets inside of a segment become numbered placeholders.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
_FRONT_MATTER = re.compile(r"(---|\+\+\+)[^\S\n]*\n(?=\S).*?\n\1[^\S\n]*(?:\n|\Z)", re.DOTALL)
_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_QUOTE = re.compile(r"(?:\s{0,3}>\s?)+")
_RAW = re.compile(r"<(!--|pre\b|script\b|style\b)", re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,9}[.)])\s+")
_MARK = re.compile(
    r"^(?:\s{0,3}>\s?|\s*(?:[-*+]|\d{1,9}[.)])\s+(?:\[[ xX]\]\s+)?|\s{0,3}#{1,6}\s+"
    r"|\s{0,3}\[\^[^\]\s]+\]:\s+)+"
)
# Rules, tags, and definitions of link targets.
_KEPT_LINE = re.compile(
    r"^\s*(?:[-*_=]\s*){3,}$|^\s*<[^>]*>\s*$|^ {0,3}\[[^\]^\n][^\]\n]*\]:\s*\S+(?:\s+[\"'(].*)?\s*$"
)
_CODE_INDENT = 4
_RULE_CHARS = frozenset("|:- \t\r\n")  # of the line below a table's head
# Code spans, link targets, labels of links and notes, tags, URLs. No alternative can match in two
# ways, so time is linear.
_PROTECTED = re.compile(
    r"(`{1,3})[^`\n]+\1|(?<=\])\((?:[^()\s]|\([^()\s]*\))*(?:\s+\"[^\"\n]*\"|\s+'[^'\n]*')?\)"
    r"|(?<=\])\[[^\[\]\n]*\]|\[\^[^\[\]\s]+\]|<[^<>\s][^<>]*>|https?://[^\s()<>]+"
)
_CELL = re.compile(r"(?<!\\)\|")
_PLACEHOLDER = re.compile(r"\[\[(\d{1,9})\]\]")


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a text; ``translates`` is False for a part that is kept."""

    text: str
    translates: bool


def paragraphs(text: str) -> Iterator[Segment]:
    """Yield the paragraphs of a plain text, and what separates them."""
    return _split(_PARAGRAPH, text)


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
    if front_matter := _FRONT_MATTER.match(text):
        yield Segment(front_matter[0], False)
        text = text[front_matter.end() :]
    prose: list[str] = []
    reader = _LineReader()
    lines = text.splitlines(keepends=True)
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        segments = reader.read(line, following, in_prose=bool(prose))
        if segments is None:
            prose.append(line)
            continue
        yield from _padded("".join(prose))
        prose.clear()
        yield from segments
    yield from _padded("".join(prose))


class _LineReader:
    """Finds the lines that are no prose."""

    def __init__(self) -> None:
        self._fence = ""
        self._is_fence_quoted = False
        self._raw_end = ""
        self._is_in_table = False
        self._list_indent: int | None = None  # of the text of the last item
        self._follows_blank = True
        self._follows_code = False

    def read(self, line: str, following: str, *, in_prose: bool) -> Iterator[Segment] | None:
        """Return the segments of a line; None if it is prose."""
        content = line.strip()
        if self._is_raw(line, content) or self._is_code(line, content, in_prose=in_prose):
            return iter([Segment(line, False)])
        is_row = self._is_row(content, following)
        self._follows_blank = not content
        if _is_kept(line):
            return iter([Segment(line, False)])
        if is_row:
            return _cells(line)
        if item := _ITEM.match(line):
            self._list_indent = len(item[0].expandtabs(_CODE_INDENT))
        if mark := _MARK.match(line):
            return iter([Segment(mark[0], False), *_padded(line[mark.end() :])])
        return None

    def _is_raw(self, line: str, content: str) -> bool:
        """Return True inside of a fence, comment, or tag of code."""
        if self._raw_end:
            if self._raw_end in content.lower():
                self._raw_end = ""
            return True
        quote = _QUOTE.match(line)
        bare = line[quote.end() :].strip() if quote else content
        if self._fence and (quote or not self._is_fence_quoted):
            is_end = len(bare) >= len(self._fence) and set(bare) == {self._fence[0]}
            self._fence = "" if is_end else self._fence
            return True
        self._fence = ""
        if found := _FENCE.match(bare):
            if quote or self._list_indent is not None or _indent(line) < _CODE_INDENT:
                self._fence, self._is_fence_quoted = found[1] or found[2], bool(quote)
                return True
        elif found := _RAW.match(content):
            name = found[1].lower()
            end = "-->" if name == "!--" else f"</{name}"
            self._raw_end = "" if end in content.lower() else end
            return bool(self._raw_end)
        return False

    def _is_code(self, line: str, content: str, *, in_prose: bool) -> bool:
        """Return True if a line is code by its indentation, which lists move to the right."""
        if not content:
            return False
        indent = _indent(line)
        if self._follows_blank and not indent and not _ITEM.match(line):
            self._list_indent = None
        begins = self._follows_code or (self._follows_blank and not in_prose)
        self._follows_code = begins and indent >= (self._list_indent or 0) + _CODE_INDENT
        return self._follows_code

    def _is_row(self, content: str, following: str) -> bool:
        is_head = "|" in content and _is_table_rule(following)
        self._is_in_table = "|" in content and (is_head or self._is_in_table)
        return self._is_in_table or content.startswith("|")


def _indent(line: str) -> int:
    expanded = line.expandtabs(_CODE_INDENT)
    return len(expanded) - len(expanded.lstrip())


def _is_table_rule(line: str) -> bool:
    return "|" in line and "-" in line and _RULE_CHARS.issuperset(line)


def _is_kept(line: str) -> bool:
    return not line.strip() or _is_table_rule(line) or _KEPT_LINE.match(line) is not None


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
    return _split(_PROTECTED, text)


def _split(kept: re.Pattern[str], text: str) -> Iterator[Segment]:
    """Yield the parts that match ``kept``, and those between them."""
    start = 0
    for found in kept.finditer(text):
        yield from _padded(text[start : found.start()])
        yield Segment(found[0], False)
        start = found.end()
    yield from _padded(text[start:])
