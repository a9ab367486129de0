"""Numbered placeholders for values that an engine or a client must not see."""

import json
import re
from collections.abc import Iterable, Sequence

from cluster.guards.patterns import Span

_LABEL = re.compile(r"[^A-Z0-9]+")
MAX_LABEL_CHARS = 24
_PLACEHOLDER = re.compile(r"\[[A-Z0-9_]+_[0-9]+\]")
_OPEN_PLACEHOLDER = re.compile(r"\[[A-Z0-9_]*")
MAX_PLACEHOLDER_CHARS = MAX_LABEL_CHARS + 12
"""Most characters of a placeholder; a stream holds back at most that many to restore one."""
MAX_VALUES = 100_000
"""Most values of a request that are restored in its answer; a router holds them meanwhile."""


class TooManyValuesError(ValueError):
    """A request has more values to replace than a router holds."""


class Placeholders:
    """Placeholders of one request; the same value always has the same one.

    Args:
        taken: Texts of the request. A placeholder that one of them contains is not used, because it
            could not be told from ours in the answer.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {found for text in taken for found in _PLACEHOLDER.findall(text)}
        self._by_value: dict[tuple[str, str], str] = {}
        self._values: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def replace(self, text: str, spans: Iterable[Span], *, restores: bool = True) -> str:
        """Return a text with placeholders instead of spans; see ``merge_spans``.

        Args:
            text: The text.
            spans: Its parts to replace.
            restores: False if ``restore`` must not return these values.

        Raises:
            TooManyValuesError: There are more than ``MAX_VALUES`` values to restore.
        """
        parts: list[str] = []
        position = 0
        for span in merge_spans(spans):
            parts += text[position : span.start], self._assign(text, span, restores=restores)
            position = span.end
        return "".join([*parts, text[position:]])

    def _assign(self, text: str, span: Span, *, restores: bool) -> str:
        label = _LABEL.sub("_", span.label.upper()).strip("_")[:MAX_LABEL_CHARS] or "VALUE"
        value = text[span.start : span.end]
        placeholder = self._by_value.get((label, value))
        if placeholder is None:
            placeholder = self._by_value[label, value] = self._next(label)
            if restores:
                if len(self._values) >= MAX_VALUES:
                    raise TooManyValuesError
                self._values[placeholder] = value
        return placeholder

    def _next(self, label: str) -> str:
        while True:
            number = self._counts[label] = self._counts.get(label, 0) + 1
            placeholder = f"[{label}_{number}]"
            if placeholder not in self._taken:
                return placeholder

    def restore(self, text: str, *, is_json: bool = False) -> str:
        """Return a text with the values instead of their placeholders.

        Args:
            text: The text.
            is_json: True if the text is JSON, so that values are escaped as in a JSON string.
        """
        if not self._values or "[" not in text:
            return text

        def value_of(found: re.Match[str]) -> str:
            value = self._values.get(found[0])
            if value is None:
                return found[0]
            return json.dumps(value)[1:-1] if is_json else value

        return _PLACEHOLDER.sub(value_of, text)

    def open_start(self, text: str) -> int:
        """Return the index from which the end of a text may become a placeholder."""
        start = text.rfind("[", max(0, len(text) - MAX_PLACEHOLDER_CHARS))
        is_open = self._values and start >= 0 and _OPEN_PLACEHOLDER.fullmatch(text, start)
        return start if is_open else len(text)


def merge_spans(spans: Iterable[Span]) -> Sequence[Span]:
    """Return spans in order; overlapping ones become one with the label of the first.

    If several begin at the same character, the longest is the first.
    """
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(span.end, merged[-1].end))
        else:
            merged.append(span)
    return merged
