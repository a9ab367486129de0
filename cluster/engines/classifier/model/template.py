"""The special tokens that a model wants around a text, or around a text and its pair. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["left", "right"]
"""Where a text that is too long loses tokens."""

PROBES = ("a probe of the special tokens", "and its pair")


@dataclass(frozen=True, slots=True)
class Template:
    """What stands before, between and after; tokens of the second segment are stored as ``~id``."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    marks_pair: bool = False
    """Whether the pair is a segment (token type) of its own."""

    @property
    def num_tokens(self) -> int:
        """The special tokens."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, ids: Sequence[int], pair: Sequence[int] = ()) -> list[int]:
        """All tokens of one input."""
        second = [~token for token in pair] if self.marks_pair else pair
        return [*self.prefix, *ids, *self.middle, *second, *self.suffix]


def single_template(backend: Any) -> Template | None:
    """The template of one text; None if the tokenizer puts special tokens inside a text.

    Args:
        backend: A ``tokenizers.Tokenizer`` without truncation and padding.
    """
    bare = backend.encode(PROBES[0], add_special_tokens=False).ids
    full = backend.encode(PROBES[0]).ids
    start = _find(bare, full, 0)
    if start is None:
        return None
    return Template(tuple(full[:start]), (), tuple(full[start + len(bare) :]))


def pair_template(backend: Any, marks_pair: bool) -> Template | None:
    """The template of a text and its pair; None if the tokenizer takes none.

    Args:
        backend: See ``single_template``.
        marks_pair: Whether the model has a token type for the second segment.
    """
    bare = [backend.encode(probe, add_special_tokens=False).ids for probe in PROBES]
    full = backend.encode(*PROBES)
    ids = full.ids
    first = _find(bare[0], ids, 0)
    second = None if first is None else _find(bare[1], ids, first + len(bare[0]))
    if first is None or second is None:
        return None
    marked = [~token if marks_pair and kind else token for token, kind in _typed(full)]
    between = marked[first + len(bare[0]) : second]
    after = marked[second + len(bare[1]) :]
    return Template(tuple(marked[:first]), tuple(between), tuple(after), marks_pair)


def fit(first: int, second: int, room: int) -> tuple[int, int]:
    """The tokens that two texts keep where both shall fit ``room``: the longer one is cut first.

    This is what transformers calls ``longest_first``.
    """
    if first + second <= room:
        return first, second
    short = min(first, second)
    if short > room - short:
        short = room // 2
    kept = (short, room - short)
    return kept if first <= second else (kept[1], kept[0])


def cut(ids: list[int], length: int, side: Side) -> list[int]:
    """The ``length`` tokens that are left when the others are cut off on ``side``."""
    return ids[:length] if side == "right" else ids[len(ids) - length :]


def _find(part: list[int], whole: list[int], start: int) -> int | None:
    for at in range(start, len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at
    return None


def _typed(encoding: Any) -> list[tuple[int, int]]:
    return list(zip(encoding.ids, encoding.type_ids, strict=True))
