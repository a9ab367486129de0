"""Where the texts of a batch lie in its matrices, and how attention's operands come out of them.

The tokens of a batch lie end to end in one [tokens, hidden] matrix. Attention alone wants texts
apart from one another: a gather brings each group of texts of like length to [texts * heads,
length, head size], padded to the longest of the group, and another one brings the result back. The
indices of both are made here, once for a batch, and serve every layer.

oneDNN makes a kernel for every shape that it has not seen: some 0.3 ms and 0.6 MB for each of the
products of a batch. So numbers of rows and lengths are rounded up a little, a group's texts go
through a product in powers of two, and few shapes come up again and again.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.batching import group_by_length
from cluster.engines.classifier.model.packed.network import Packed
from cluster.engines.classifier.model.types import TokenIds

MAX_PADDING = 0.3
"""Share of a group's cells in attention that may be padding. It takes little of the time there, and
a call for each tiny group takes more: 32 texts in arrival order gave 320, 350, 420 and 510 texts a
second with 0, 0.02, 0.1 and 0.3; of like length, 850 whatever the share."""
FLOAT32_LANES = 16
"""Numbers in a register of 512 bits. PyTorch's softmax adds up a row that does not fill one in
another order, so a shorter text is never padded to this length: it would have other scores than
alone, by up to 0.002 in bfloat16."""

LANE = 4
"""Lengths and numbers of rows are multiples of it."""
ROW_BITS = 6
"""Significant bits of numbers of rows: 1 % of the rows is padding; 190 of them up to 1,024."""
LENGTH_BITS = 4
"""The same of lengths in attention, which takes little of the time."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that attention computes together."""

    texts: int
    length: int
    """Of the longest, rounded up; the others are padded to it."""
    mask: Tensor | None
    """[texts, 1, 1, length], minus infinity where there is padding; None where there is none."""
    portions: tuple[slice, ...]
    """The rows of [texts * heads, ...] in runs of a power of two of texts, largest first."""

    @property
    def cells(self) -> int:
        """Tokens, and what pads them."""
        return self.texts * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """One batch's layout for a model with ``heads`` heads."""

    packed: Packed
    groups: tuple[Group, ...]
    query_key_value: Tensor
    """Of a [tokens * 3 * heads, head size] matrix, the rows that each group's attention takes."""
    key_value: Tensor
    """The same of a [tokens * 2 * heads, head size] matrix."""
    num_tokens: int
    padded_pairs: int
    """Pairs of tokens that attention computes and that are none, as one of the two is padding."""
    back: Tensor
    """Of the groups' outputs end to end, the rows that make up [tokens * heads, head size]."""

    @classmethod
    def of(cls, ids: Sequence[TokenIds], heads: int, mask_dtype: torch.dtype) -> "Layout":
        """The layout of ``ids``, in ascending order of length; ``~id``: of the second segment."""
        lengths = np.array([len(row) for row in ids])
        num_tokens = int(lengths.sum())
        firsts = np.cumsum(lengths) - lengths
        rounded = [round_up(length, LENGTH_BITS, LANE) for length in lengths.tolist()]
        parts = [
            _Part(firsts[run], lengths[run], rounded[run.stop - 1], heads)
            for run in _groups(rounded)
        ]
        num_rows = round_up(num_tokens, ROW_BITS, LANE)
        num_slots = round_up(len(ids), ROW_BITS, LANE)
        starts = np.cumsum([0, *(part.size for part in parts)])[:-1]
        backs = [start + part.back() for start, part in zip(starts, parts, strict=True)]
        tokens, second = _segments(_padded(np.concatenate(ids), num_rows))
        positions = np.arange(num_tokens) - np.repeat(firsts, lengths)
        rest = (
            _padded(positions, num_rows),
            _padded(firsts, num_slots),
            _padded(np.repeat(np.arange(len(ids)), lengths), num_rows, num_slots),
        )
        return cls(
            packed=Packed(tokens, second, *map(torch.from_numpy, rest)),
            groups=tuple(part.group(mask_dtype) for part in parts),
            query_key_value=torch.from_numpy(np.concatenate([part.rows(3) for part in parts])),
            key_value=torch.from_numpy(np.concatenate([part.rows(2) for part in parts])),
            num_tokens=num_tokens,
            padded_pairs=sum(part.pairs for part in parts) - int((lengths**2).sum()),
            back=torch.from_numpy(_padded(np.concatenate(backs), num_rows * heads)),
        )


def round_up(number: int, bits: int, step: int = 1) -> int:
    """The next number with so few significant bits, and a multiple of ``step``, a power of two."""
    step = max(step, 1 << max(0, number.bit_length() - bits))
    return -(-number // step) * step


def _padded(numbers: Indices, size: int, filler: int = 0) -> Indices:
    return np.pad(numbers, (0, size - len(numbers)), constant_values=filler)


def _portions(texts: int, heads: int) -> tuple[slice, ...]:
    found, start = [], 0
    for bit in reversed(range(texts.bit_length())):
        if texts >> bit & 1:
            stop = start + (heads << bit)
            found.append(slice(start, stop))
            start = stop
    return tuple(found)


def _groups(lengths: Sequence[int]) -> list[slice]:
    """Runs of ascending ``lengths`` that attention computes together."""
    split = bisect.bisect_left(lengths, FLOAT32_LANES)
    return [
        slice(start + run.start, start + run.stop)
        for start, part in ((0, lengths[:split]), (split, lengths[split:]))
        for run in group_by_length(part, MAX_PADDING)
    ]


def _segments(tokens: Indices) -> tuple[Tensor, Tensor | None]:
    marked = tokens < 0
    if not marked.any():
        return torch.from_numpy(tokens), None
    return torch.from_numpy(np.where(marked, ~tokens, tokens)), torch.from_numpy(marked[:, None])


class _Part:
    """The indices of one group."""

    def __init__(self, firsts: Indices, lengths: Indices, length: int, heads: int) -> None:
        self._length, self._heads = length, np.arange(heads)
        self._firsts = firsts[:, None]
        self._valid = np.arange(length) < lengths[:, None]
        self.size = heads * self._valid.size
        self.pairs = self._valid.size * length

    def group(self, mask_dtype: torch.dtype) -> Group:
        mask = None
        if not self._valid.all():
            mask = torch.from_numpy(np.where(self._valid, np.float32(0), np.float32(-np.inf)))
            mask = mask.to(mask_dtype)[:, None, None, :]
        texts = len(self._firsts)
        return Group(texts, self._length, mask, _portions(texts, len(self._heads)))

    def rows(self, parts: int) -> Indices:
        """In the order [parts, texts, heads, length]; padding repeats the text's last token."""
        inside = self._valid.cumsum(1) - 1
        tokens = (self._firsts + inside)[None, :, None, :]
        part = np.arange(parts)[:, None, None, None]
        heads = len(self._heads)
        rows = (tokens * parts + part) * heads + self._heads[:, None]
        return np.asarray(rows.reshape(-1), np.int64)

    def back(self) -> Indices:
        """In the order [tokens, heads]; of rows in the order [texts, heads, length]."""
        text = np.arange(len(self._firsts))[:, None, None] * len(self._heads)
        rows = (text + self._heads) * self._length + np.arange(self._length)[:, None]
        return np.asarray(rows[self._valid].reshape(-1), np.int64)
