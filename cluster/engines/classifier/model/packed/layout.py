"""Layout of a batch: rows of its texts, and the gather indices of attention's operands.

The tokens of a batch are the rows of one [tokens, hidden] matrix. Only attention needs the texts
apart. One gather brings the queries of each group of texts of similar length to [texts * heads,
length, head size], padded to the longest text of the group, and its keys and values to whole
registers; another gather brings the result back. The indices of both are made here, once per batch,
and used by every layer.

oneDNN compiles a kernel for every new shape, which costs about 0.3 ms and 0.6 MB for each product
of a batch. Numbers of rows and lengths are therefore rounded up, and a group's texts are split into
powers of two, so that few shapes occur.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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
REGISTER_BYTES = 64
"""Size of a 512-bit register. Rows of scores fill whole registers, because PyTorch's softmax and
the addition of the mask compute the rest of a row value by value: attention within 37 texts of 27
tokens took 2.2 ms with rows of 28 values, and takes 1.3 with 32. Such rows are also summed in an
order that does not depend on the padding, so a text gets the same result in every batch."""
MAX_CACHED = 64
"""Cached layouts of single texts, each of which takes 0.6 KB per token."""

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
    """Number of queries: the length of the longest text, rounded up."""
    keys: int
    """Number of keys: ``length`` rounded up to whole registers."""
    mask: Tensor | None
    """Minus infinity for padding, [texts, 1, 1, keys]; None if there is no padding."""
    portions: tuple[slice, ...]
    """Runs of rows of [texts * heads, ...], each of a power of two of texts, largest first."""

    @property
    def queries(self) -> int:
        """Number of queries of all texts."""
        return self.texts * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of batches of texts of given lengths, for a model with a given number of heads."""

    groups: tuple[Group, ...]
    query_key_value: Tensor
    """Rows of the [tokens * 3 * heads, head size] matrix in the order of the groups' operands."""
    key_value: Tensor
    """Rows of the [tokens * 2 * heads, head size] matrix in the order of the groups' operands."""
    back: Tensor
    """Rows of the groups' outputs, end to end, in the order [tokens * heads]."""
    num_tokens: int
    padded_pairs: int
    """Pairs of tokens in attention of which at least one is padding."""
    positions: Tensor
    starts: Tensor
    text_index: Tensor

    @classmethod
    def for_lengths(cls, lengths: Sequence[int], heads: int, mask_dtype: torch.dtype) -> "Layout":
        """Lay out texts of ascending ``lengths``; a single text's layout is cached."""
        make = _layout_of_one if len(lengths) == 1 else _make_layout
        return make(tuple(lengths), heads, mask_dtype)

    def pack(self, ids: Sequence[TokenIds]) -> Packed:
        """Return the tokens of texts of these lengths; ``~id`` is one of the second segment."""
        tokens, second = _split_segments(_pad(np.concatenate(ids), len(self.positions)))
        return Packed(tokens, second, self.positions, self.starts, self.text_index)


def _make_layout(lengths: tuple[int, ...], heads: int, mask_dtype: torch.dtype) -> Layout:
    sizes = np.array(lengths)
    num_tokens = int(sizes.sum())
    starts = np.cumsum(sizes) - sizes
    rounded = [round_up(length, LENGTH_BITS, LANE) for length in lengths]
    lanes = REGISTER_BYTES // mask_dtype.itemsize
    parts = [
        _GroupIndices(starts[run], sizes[run], rounded[run.stop - 1], lanes, heads)
        for run in group_by_length(rounded, MAX_PADDING)
    ]
    num_rows = round_up(num_tokens, ROW_BITS, LANE)
    num_texts = round_up(len(sizes), ROW_BITS, LANE)
    offsets = np.cumsum([0, *(part.size for part in parts)])[:-1]
    backs = [offset + part.back() for offset, part in zip(offsets, parts, strict=True)]
    text_index = np.repeat(np.arange(len(sizes)), sizes)
    return Layout(
        groups=tuple(part.group(mask_dtype) for part in parts),
        query_key_value=torch.from_numpy(
            np.concatenate([part.query_key_value() for part in parts])
        ),
        key_value=torch.from_numpy(np.concatenate([part.key_value() for part in parts])),
        back=torch.from_numpy(_pad(np.concatenate(backs), num_rows * heads)),
        num_tokens=num_tokens,
        padded_pairs=sum(part.num_pairs for part in parts) - int((sizes**2).sum()),
        positions=torch.from_numpy(_pad(np.arange(num_tokens) - starts[text_index], num_rows)),
        starts=torch.from_numpy(_pad(starts, num_texts)),
        text_index=torch.from_numpy(_pad(text_index, num_rows, num_texts)),
    )


_layout_of_one = lru_cache(MAX_CACHED)(_make_layout)


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


def _split_segments(tokens: Indices) -> tuple[Tensor, Tensor | None]:
    """Return the plain token ids, and which of them are of the second segment."""
    marked = tokens < 0
    if not marked.any():
        return torch.from_numpy(tokens), None
    return torch.from_numpy(np.where(marked, ~tokens, tokens)), torch.from_numpy(marked[:, None])


class _GroupIndices:
    """Gather indices of one group."""

    def __init__(
        self, starts: Indices, lengths: Indices, length: int, lanes: int, heads: int
    ) -> None:
        self._length, self._heads = length, np.arange(heads)
        self._starts, self._lengths = starts[:, None], lengths[:, None]
        self._keys = -(-length // lanes) * lanes
        self.size = len(starts) * heads * length
        self.num_pairs = len(starts) * length * self._keys

    def group(self, mask_dtype: torch.dtype) -> Group:
        mask, texts = None, len(self._starts)
        valid = np.arange(self._keys) < self._lengths
        if not valid.all():
            mask = torch.from_numpy(np.where(valid, np.float32(0), np.float32(-np.inf)))
            mask = mask.to(mask_dtype)[:, None, None, :]
        portions = _portions(texts, len(self._heads))
        return Group(texts, self._length, self._keys, mask, portions)

    def query_key_value(self) -> Indices:
        parts = ((0, self._length), (1, self._keys), (2, self._keys))
        return np.concatenate([self._rows(part, 3, columns) for part, columns in parts])

    def key_value(self) -> Indices:
        return np.concatenate([self._rows(part, 2, self._keys) for part in range(2)])

    def _rows(self, part: int, parts: int, columns: int) -> Indices:
        """Return the rows of one part in the order [texts, heads, columns]."""
        tokens = self._starts + np.minimum(np.arange(columns), self._lengths - 1)
        rows = (tokens[:, None, :] * parts + part) * len(self._heads) + self._heads[:, None]
        return np.asarray(rows.reshape(-1), np.int64)

    def back(self) -> Indices:
        """Return rows of [texts, heads, length] in the order [tokens, heads]."""
        text = np.arange(len(self._starts))[:, None, None] * len(self._heads)
        columns = np.arange(self._length)
        rows = (text + self._heads) * self._length + columns[:, None]
        return np.asarray(rows[columns < self._lengths].reshape(-1), np.int64)
