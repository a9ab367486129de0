"""Positions of extracted values in a text."""

import unicodedata
from array import array

MAX_TRIES = 1000
"""Occurrences inside of longer words that are skipped before a value counts as missing."""
# Scripts whose words touch: Thai to Myanmar, Khmer, kana, Han, Hangul.
_UNSPACED = (
    *((0x0E00, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF)),
    *((0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)


class Finder:
    """Positions of values in a text, up to case and white space; equal values get successive ones.

    The time is linear in the text for each value.
    """

    def __init__(self, text: str) -> None:
        folded: list[str] = []
        self._starts = array("I")  # position in the text, by position in the folded text
        was_space = False
        for index, char in enumerate(text):
            is_space = char.isspace()
            if not (is_space and was_space):
                piece = " " if is_space else char.casefold()
                folded.append(piece)
                self._starts.extend([index] * len(piece))
            was_space = is_space
        self._folded = "".join(folded)
        self._next: dict[str, int] = {}

    def find(self, value: str) -> tuple[int, int] | None:
        """Return start and end of a value, in characters; None if it is not there."""
        wanted = " ".join(value.casefold().split())
        if not wanted:
            return None
        place = self._search(wanted, self._next.get(wanted, 0))
        if place is None:
            place = self._search(wanted, 0)
        if place is None:
            return None
        self._next[wanted] = end = place + len(wanted)
        return self._starts[place], self._starts[end - 1] + 1

    def _search(self, wanted: str, start: int) -> int | None:
        text = self._folded
        for _ in range(MAX_TRIES):
            place = text.find(wanted, start)
            if place < 0:
                return None
            if not (_goes_on(text, place) or _goes_on(text, place + len(wanted))):
                return place
            start = place + 1
        return None


def _goes_on(text: str, place: int) -> bool:
    """Return True if a word or decimal number goes on across a place in a text."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    if unicodedata.category(after).startswith("M"):  # of a character of two code points
        return True
    if before.isdigit() and after == ".":
        return text[place + 1 : place + 2].isdigit()
    if before == "." and after.isdigit():
        return place > 1 and text[place - 2].isdigit()
    return _joins(before) and _joins(after)


def _joins(char: str) -> bool:
    if not (char.isalnum() or char == "_" or unicodedata.category(char).startswith("M")):
        return False
    code = ord(char)
    return not any(first <= code <= last for first, last in _UNSPACED)
