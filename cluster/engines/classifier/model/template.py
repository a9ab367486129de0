"""Special tokens around a text or a pair of texts, and truncation. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.engines.classifier.model.types import Side

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
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def join(self, ids: Sequence[int], pair: Sequence[int] = ()) -> list[int]:
        second = [~token for token in pair] if self.marks_pair else pair
        return [*self.prefix, *ids, *self.middle, *second, *self.suffix]


def find_template(backend: Any, num_texts: int, marks_pair: bool = False) -> Template | None:
    """Return the template of one text or of a pair.

    None if special tokens are put inside a text, or if the tokenizer takes no pairs.

    Args:
        backend: A ``tokenizers.Tokenizer`` without truncation and padding.
        num_texts: 1, or 2 for a pair.
        marks_pair: True if the model has a token type for the second segment.
    """
    probes = PROBES[:num_texts]
    full = backend.encode(*probes)
    types = zip(full.ids, full.type_ids, strict=True)
    marked = [~token if marks_pair and token_type else token for token, token_type in types]
    special, end = [], 0
    for probe in probes:
        bare = backend.encode(probe, add_special_tokens=False).ids
        start = _find(bare, full.ids, end)
        if start is None:
            return None
        special.append(tuple(marked[end:start]))
        end = start + len(bare)
    middle = special[1] if num_texts == 2 else ()
    return Template(special[0], middle, tuple(marked[end:]), marks_pair)


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
    starts = range(start, len(whole) - len(part) + 1)
    return next((i for i in starts if whole[i : i + len(part)] == part), None)
