"""Map from prompt prefixes, as text, to the blocks in an engine's KV cache.

The engine reports which blocks it stores and removes, each with its tokens. Each request shows the
tokens of a text. A prefix of a text counts as cached while the last block within it is cached.
Bounded; independent of the engine and of the link.
"""

import re
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest as digest

from cluster.link import PrefixEvents
from cluster.routing import Fingerprint
from cluster.routing.fingerprint import TOKEN_ID_BYTES

MAX_PREFIXES = 2**17
"""Cached prefixes, about 10 million tokens; the one requested longest ago is dropped first."""
MAX_AWAITED_BLOCKS = 2**14
"""Blocks that requests have used and that the engine has not stored yet, or has evicted."""
MAX_CHANGES = 2**14
"""Changes reported one by one; after more, all cached prefixes are reported again."""
MAX_PREFIXES_PER_BLOCK = 64
"""Prefixes with the same last block; more of them differ only in text that makes no tokens."""
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")

Lengths = NDArray[np.int64]
ByteLengths = Callable[[NDArray[np.uint32]], Lengths]
"""Maps token ids to their text lengths in bytes; special tokens have length 0."""


def make_byte_lengths(vocabulary: Mapping[str, int], special: Iterable[int]) -> ByteLengths:
    """Return the byte lengths of a tokenizer's pieces, byte-level BPE or SentencePiece."""
    is_byte_level = any("\u0120" in piece for piece in vocabulary)
    table = np.zeros(max(vocabulary.values(), default=0) + 2, np.int64)  # last: unknown ids
    for piece, token in vocabulary.items():
        if is_byte_level:  # one character per byte
            table[token] = len(piece)
        elif _BYTE_PIECE.fullmatch(piece):
            table[token] = 1
        else:
            table[token] = len(piece.replace("\u2581", " ").encode())
    unknown = len(table) - 1
    table[[token for token in special if token < unknown]] = 0
    return lambda ids: table[np.minimum(ids, unknown)]


class PrefixTracker:
    """Prefixes in the cache of one engine; a ``PrefixSource``.

    Args:
        block_size: Tokens per block.
        byte_lengths: Byte lengths of the tokenizer's pieces, to find a prefix among the tokens.
        max_prefixes: Limit on cached prefixes.
    """

    def __init__(
        self, block_size: int, byte_lengths: ByteLengths, max_prefixes: int = MAX_PREFIXES
    ) -> None:
        self.block_size = block_size
        self.on_change: Callable[[], None] | None = None
        self._byte_lengths = byte_lengths
        self._max_prefixes = max_prefixes
        # A block's key is a hash of its tokens and all tokens before it.
        self._keys: dict[Hashable, int] = {}  # key of each cached block
        self._copies: dict[Hashable, int] = {}  # number of copies, for blocks cached repeatedly
        self._cached_keys: set[int] = set()
        self._awaited: dict[int, None] = {}  # keys that prefixes need and that are not cached
        self._prefixes_of: dict[int, dict[int, None]] = {}  # prefixes by the key they need
        self._cached: dict[int, int] = {}  # number of cached blocks of each prefix, oldest first
        self._changes: dict[int, bool] = {}  # changed prefixes; True if cached now
        self._report_all = False

    # -- events of the engine --

    def add_blocks(
        self,
        blocks: Sequence[Hashable],
        parent: Hashable | None,
        token_ids: Sequence[int],
        adapter: str = "",
    ) -> None:
        """Record consecutive blocks that were filled and can be shared.

        Args:
            blocks: The engine's names of the blocks, in order.
            parent: Block before the first one; None at the start of a prompt.
            token_ids: Tokens of all blocks. If their number does not match, nothing is recorded.
            adapter: LoRA adapter the blocks were computed with.
        """
        parent_key = _root_key(adapter) if parent is None else self._keys.get(parent)
        if parent_key is None or len(token_ids) != len(blocks) * self.block_size:
            return
        keys = list(self._block_keys(parent_key, array("I", token_ids)))
        # In reverse order, as in ``add_prompt``: the limits then drop ends of prompts first.
        for block, key in zip(reversed(blocks), reversed(keys), strict=True):
            if block in self._keys:
                self._copies[block] = self._copies.get(block, 1) + 1
                continue
            self._keys[block] = key
            self._cached_keys.add(key)
            self._awaited.pop(key, None)
            for prefix in self._prefixes_of.get(key, ()):
                self._increment(prefix)

    def remove_blocks(self, blocks: Iterable[Hashable]) -> None:
        for block in blocks:
            copies = self._copies.pop(block, 1)
            if copies > 2:
                self._copies[block] = copies - 1
            if copies > 1 or (key := self._keys.pop(block, None)) is None:
                continue
            self._cached_keys.discard(key)
            if prefixes := self._prefixes_of.get(key):
                self._awaited[key] = None
                for prefix in prefixes:
                    self._decrement(prefix)
        self._limit_awaited()

    def clear(self) -> None:
        """Forget everything: the cache was emptied, or events were lost."""
        self._keys.clear()
        self._copies.clear()
        self._cached_keys.clear()
        self._prefixes_of.clear()
        self._awaited.clear()
        self._cached.clear()
        self._report_everything()

    # -- requests --

    def add_prompt(self, text: Fingerprint, token_ids: Sequence[int], adapter: str = "") -> None:
        num_blocks = len(token_ids) // self.block_size
        if not text.hashes or not num_blocks:
            return
        ids = array("I", token_ids)
        counts = self._count_blocks(text, ids)
        covered = ids[: counts[-1] * self.block_size]
        keys = list(self._block_keys(_root_key(adapter), covered))
        for prefix, count in zip(reversed(text.hashes), reversed(counts), strict=True):
            self._link(prefix, keys[count - 1])
        while len(self._cached) > self._max_prefixes:
            oldest = next(iter(self._cached))
            del self._cached[oldest]
            self._report(oldest, False)
        self._limit_awaited()

    # -- PrefixSource --

    def take_events(self) -> PrefixEvents | None:
        """Return the changes since the last call, or None."""
        if self._report_all:
            self._report_all = False
            self._changes.clear()
            return PrefixEvents(stored=self.snapshot(), cleared=True)
        if not self._changes:
            return None
        changes, self._changes = self._changes, {}
        return PrefixEvents(
            stored=[prefix for prefix, cached in changes.items() if cached],
            removed=[prefix for prefix, cached in changes.items() if not cached],
        )

    def snapshot(self) -> Sequence[int]:
        return list(self._cached)

    # -- private --

    def _block_keys(self, key: int, ids: "array[int]") -> Iterable[int]:
        """Yield the key of each full block, continuing from the key of the block before."""
        view, size = memoryview(ids), self.block_size
        for start in range(0, len(ids) - size + 1, size):
            key = digest(view[start : start + size], key)
            yield key

    def _count_blocks(self, text: Fingerprint, ids: "array[int]") -> list[int]:
        """Return the number of whole blocks within each prefix, at least 1.

        A chat template adds text at unknown positions, which is assumed to be spread evenly.
        """
        ends: Any = np.array(text.ends, np.float64)
        if text.is_tokens:
            tokens = ends // TOKEN_ID_BYTES
        else:
            before = np.cumsum(self._byte_lengths(np.frombuffer(ids, np.uint32)))
            tokens = np.searchsorted(before, ends * (before[-1] / text.total_bytes), side="right")
        max_blocks = len(ids) // self.block_size
        counts = np.clip(tokens // self.block_size, 1, max_blocks)
        return counts.astype(int).tolist()  # type: ignore[no-any-return]

    def _link(self, prefix: int, key: int) -> None:
        """Let ``prefix`` count as cached while the block with ``key`` is cached."""
        prefixes = self._prefixes_of.setdefault(key, {})
        is_cached = key in self._cached_keys
        if not is_cached:
            self._awaited.pop(key, None)
            self._awaited[key] = None
        if prefix in prefixes:
            if prefix in self._cached:  # move it to the end of the eviction order
                self._cached[prefix] = self._cached.pop(prefix)
                return
        elif len(prefixes) >= MAX_PREFIXES_PER_BLOCK:
            return
        prefixes[prefix] = None
        if is_cached:
            self._increment(prefix)

    def _limit_awaited(self) -> None:
        while len(self._awaited) > MAX_AWAITED_BLOCKS:
            oldest = next(iter(self._awaited))
            del self._awaited[oldest], self._prefixes_of[oldest]

    def _increment(self, prefix: int) -> None:
        count = self._cached.pop(prefix, 0)
        self._cached[prefix] = count + 1
        if not count:
            self._report(prefix, True)

    def _decrement(self, prefix: int) -> None:
        count = self._cached.get(prefix, 0)
        if count > 1:
            self._cached[prefix] = count - 1
        elif count:
            del self._cached[prefix]
            self._report(prefix, False)

    def _report(self, prefix: int, cached: bool) -> None:
        if self._report_all:
            return
        self._changes[prefix] = cached
        if len(self._changes) > MAX_CHANGES:
            self._report_everything()
        elif len(self._changes) == 1:
            self._notify()

    def _report_everything(self) -> None:
        self._changes.clear()
        if not self._report_all:
            self._report_all = True
            self._notify()

    def _notify(self) -> None:
        if self.on_change is not None:
            self.on_change()


def _root_key(adapter: str) -> int:
    return digest(adapter.encode())
