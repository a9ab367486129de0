"""Special tokens around a text or a pair of texts, and truncation. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["left", "right"]
"""Side on which a long text is cut."""

PROBES = ("a probe of the special tokens", "and its pair")


@dataclass(frozen=True, slots=True)
class Template:
    """Special tokens of one input row; tokens of the second segment are stored as ``~id``."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    marks_pair: bool = False
    """True if the second text has token type 1."""

    @property
    def num_tokens(self) -> int:
        """Number of special tokens."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, ids: Sequence[int], pair: Sequence[int] = ()) -> list[int]:
        """Return the input row of a text and its pair."""
        second = [~token for token in pair] if self.marks_pair else pair
        return [*self.prefix, *ids, *self.middle, *second, *self.suffix]


def single_template(backend: Any) -> Template | None:
    """Return the template of one text; None if special tokens are put inside a text.

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
    """Return the template of a text and its pair; None if the tokenizer takes no pairs.

    Args:
        backend: A ``tokenizers.Tokenizer`` without truncation and padding.
        marks_pair: True if the model has a token type for the second segment.
    """
    bare = [backend.encode(probe, add_special_tokens=False).ids for probe in PROBES]
    full = backend.encode(*PROBES)
    first = _find(bare[0], full.ids, 0)
    second = None if first is None else _find(bare[1], full.ids, first + len(bare[0]))
    if first is None or second is None:
        return None
    types = zip(full.ids, full.type_ids, strict=True)
    marked = [~token if marks_pair and token_type else token for token, token_type in types]
    between = marked[first + len(bare[0]) : second]
    after = marked[second + len(bare[1]) :]
    return Template(tuple(marked[:first]), tuple(between), tuple(after), marks_pair)


def fit_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts fit ``room`` if the longer text is cut first.

    The result is that of transformers' ``longest_first``.
    """
    if first + second <= room:
        return first, second
    short = min(first, second)
    if short > room - short:
        short = room // 2
    kept = (short, room - short)
    return kept if first <= second else (kept[1], kept[0])


def cut_ids(ids: list[int], length: int, side: Side) -> list[int]:
    """Return ``length`` tokens after cutting the others off on ``side``."""
    return ids[:length] if side == "right" else ids[len(ids) - length :]


def _find(part: list[int], whole: list[int], start: int) -> int | None:
    for index in range(start, len(whole) - len(part) + 1):
        if whole[index : index + len(part)] == part:
            return index
    return None
