"""Layout of a batch: rows of its texts, and the gather indices of attention's operands.

The tokens of a batch are the rows of one [tokens, hidden] matrix. Only attention needs the texts
apart. One gather brings each group of texts of similar length to [texts * heads, length, head
size], padded to the longest text of the group; another gather brings the result back. The indices
of both are made here, once per batch, and used by every layer.

oneDNN compiles a kernel for every new shape, which costs about 0.3 ms and 0.6 MB for each product
of a batch. Numbers of rows and lengths are therefore rounded up, and a group's texts are split into
powers of two, so that few shapes occur.
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
"""Share of a group's cells in attention that may be padding. Attention takes little of the time,
and a call for each tiny group takes more: with 0, 0.02, 0.1 and 0.3, batches of 32 texts in arrival
order gave 320, 350, 420 and 510 texts/s. Texts of equal length gave 850 with any share."""
FLOAT32_LANES = 16
"""Values in a 512-bit register. PyTorch's softmax sums a row shorter than that in another order, so
shorter texts are never padded to this length: their scores would change by up to 0.002 in
bfloat16."""

LANE = 4
"""Lengths and numbers of rows are multiples of this."""
ROW_BITS = 6
"""Significant bits of numbers of rows: 1 % padding, and 128 possible numbers up to 1,024."""
LENGTH_BITS = 4
"""Significant bits of lengths in attention."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that attention computes together."""

    texts: int
    length: int
    """Length of the longest text, rounded up; the others are padded to it."""
    mask: Tensor | None
    """Minus infinity for padding, [texts, 1, 1, length]; None if there is no padding."""
    portions: tuple[slice, ...]
    """Runs of rows of [texts * heads, ...], each of a power of two of texts, largest first."""

    @property
    def cells(self) -> int:
        """Number of tokens, padding included."""
        return self.texts * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of one batch for a model with a given number of heads."""

    packed: Packed
    groups: tuple[Group, ...]
    query_key_value: Tensor
    """Rows of the [tokens * 3 * heads, head size] matrix in the order of the groups' operands."""
    key_value: Tensor
    """Rows of the [tokens * 2 * heads, head size] matrix in the order of the groups' operands."""
    num_tokens: int
    padded_pairs: int
    """Pairs of tokens in attention of which at least one is padding."""
    back: Tensor
    """Rows of the groups' outputs, end to end, in the order [tokens * heads]."""

    @classmethod
    def for_batch(cls, ids: Sequence[TokenIds], heads: int, mask_dtype: torch.dtype) -> "Layout":
        """Lay out ``ids``, which ascend in length; ``~id`` is a token of the second segment."""
        lengths = np.array([len(row) for row in ids])
        num_tokens = int(lengths.sum())
        starts = np.cumsum(lengths) - lengths
        rounded = [round_up(length, LENGTH_BITS, LANE) for length in lengths.tolist()]
        parts = [
            _GroupIndices(starts[run], lengths[run], rounded[run.stop - 1], heads)
            for run in _group_runs(rounded)
        ]
        num_rows = round_up(num_tokens, ROW_BITS, LANE)
        num_texts = round_up(len(ids), ROW_BITS, LANE)
        offsets = np.cumsum([0, *(part.size for part in parts)])[:-1]
        backs = [offset + part.back() for offset, part in zip(offsets, parts, strict=True)]
        tokens, second = _split_segments(_pad(np.concatenate(ids), num_rows))
        positions = np.arange(num_tokens) - np.repeat(starts, lengths)
        rest = (
            _pad(positions, num_rows),
            _pad(starts, num_texts),
            _pad(np.repeat(np.arange(len(ids)), lengths), num_rows, num_texts),
        )
        return cls(
            packed=Packed(tokens, second, *map(torch.from_numpy, rest)),
            groups=tuple(part.group(mask_dtype) for part in parts),
            query_key_value=torch.from_numpy(np.concatenate([part.rows(3) for part in parts])),
            key_value=torch.from_numpy(np.concatenate([part.rows(2) for part in parts])),
            num_tokens=num_tokens,
            padded_pairs=sum(part.num_pairs for part in parts) - int((lengths**2).sum()),
            back=torch.from_numpy(_pad(np.concatenate(backs), num_rows * heads)),
        )


def round_up(number: int, bits: int, step: int = 1) -> int:
    """Round up to ``bits`` significant bits and to a multiple of ``step``, a power of two."""
    step = max(step, 1 << max(0, number.bit_length() - bits))
    return -(-number // step) * step


def _pad(numbers: Indices, size: int, filler: int = 0) -> Indices:
    return np.pad(numbers, (0, size - len(numbers)), constant_values=filler)


def _portions(texts: int, heads: int) -> tuple[slice, ...]:
    portions, start = [], 0
    for bit in reversed(range(texts.bit_length())):
        if texts >> bit & 1:
            stop = start + (heads << bit)
            portions.append(slice(start, stop))
            start = stop
    return tuple(portions)


def _group_runs(lengths: Sequence[int]) -> list[slice]:
    """Return the runs of ascending ``lengths`` that attention computes together."""
    split = bisect.bisect_left(lengths, FLOAT32_LANES)
    return [
        slice(start + run.start, start + run.stop)
        for start, part in ((0, lengths[:split]), (split, lengths[split:]))
        for run in group_by_length(part, MAX_PADDING)
    ]


def _split_segments(tokens: Indices) -> tuple[Tensor, Tensor | None]:
    """Return the plain token ids, and which of them are of the second segment."""
    marked = tokens < 0
    if not marked.any():
        return torch.from_numpy(tokens), None
    return torch.from_numpy(np.where(marked, ~tokens, tokens)), torch.from_numpy(marked[:, None])


class _GroupIndices:
    """Gather indices of one group."""

    def __init__(self, starts: Indices, lengths: Indices, length: int, heads: int) -> None:
        self._length, self._heads = length, np.arange(heads)
        self._starts = starts[:, None]
        self._valid = np.arange(length) < lengths[:, None]
        self.size = heads * self._valid.size
        self.num_pairs = self._valid.size * length

    def group(self, mask_dtype: torch.dtype) -> Group:
        mask = None
        if not self._valid.all():
            mask = torch.from_numpy(np.where(self._valid, np.float32(0), np.float32(-np.inf)))
            mask = mask.to(mask_dtype)[:, None, None, :]
        texts = len(self._starts)
        return Group(texts, self._length, mask, _portions(texts, len(self._heads)))

    def rows(self, parts: int) -> Indices:
        """Return rows in the order [parts, texts, heads, length]; padding is the last token."""
        inside = self._valid.cumsum(1) - 1
        tokens = (self._starts + inside)[None, :, None, :]
        part = np.arange(parts)[:, None, None, None]
        heads = len(self._heads)
        rows = (tokens * parts + part) * heads + self._heads[:, None]
        return np.asarray(rows.reshape(-1), np.int64)

    def back(self) -> Indices:
        """Return rows of [texts, heads, length] in the order [tokens, heads]."""
        text = np.arange(len(self._starts))[:, None, None] * len(self._heads)
        rows = (text + self._heads) * self._length + np.arange(self._length)[:, None]
        return np.asarray(rows[self._valid].reshape(-1), np.int64)
