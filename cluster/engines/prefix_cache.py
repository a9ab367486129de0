"""Which prefixes of prompts' texts an engine has in its KV cache: ties texts to KV blocks.

An engine says which blocks it stores and removes, each with its tokens; a request shows which text
became which tokens. A prefix of a text is held while the last block is cached that lies within
it. Owns what is held and what routers were not told yet; bounded. Knows no engine and no link.
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

MAX_PREFIXES = 2**17
"""Prefixes that are held; the one asked for longest ago makes room. Some 10 million tokens."""
MAX_AWAITED = 2**14
"""Blocks that requests have asked for and the engine has not stored, or has evicted since."""
MAX_NEWS = 2**14
"""Changes that are told one by one; after more, all that is held is told again."""
MAX_RESTING = 64
"""Prefixes that rest on one block: more differ in what is not in the tokens."""
_ID_BYTES = 4
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")

Lengths = NDArray[np.int64]
ByteLengths = Callable[[NDArray[np.uint32]], Lengths]
"""Token ids -> how many bytes of text each of them is; 0 for special tokens."""


def byte_lengths_of(vocabulary: Mapping[str, int], special: Iterable[int]) -> ByteLengths:
    """The lengths of a tokenizer's pieces, byte-level BPE or SentencePiece by their looks."""
    is_byte_level = any("\u0120" in piece for piece in vocabulary)
    table = np.zeros(max(vocabulary.values(), default=0) + 2, np.int64)  # the last is of others
    for piece, token in vocabulary.items():
        if is_byte_level:  # one character stands for each byte
            table[token] = len(piece)
        elif _BYTE_PIECE.fullmatch(piece):
            table[token] = 1
        else:
            table[token] = len(piece.replace("\u2581", " ").encode())
    others = len(table) - 1
    table[[token for token in special if token < others]] = 0
    return lambda ids: table[np.minimum(ids, others)]


class PrefixTracker:
    """Follows one engine's cache.

    Args:
        block_size: Tokens in a block.
        byte_lengths: The tokenizer's, by which the place of a prefix among the tokens is found.
        max_prefixes: How many are held at most.
    """

    def __init__(
        self, block_size: int, byte_lengths: ByteLengths, max_prefixes: int = MAX_PREFIXES
    ) -> None:
        self.block_size = block_size
        self.on_change: Callable[[], None] | None = None
        self._byte_lengths = byte_lengths
        self._max_prefixes = max_prefixes
        self._keys: dict[Hashable, int] = {}  # of each cached block, from its tokens
        self._copies: dict[Hashable, int] = {}  # of blocks that are cached more than once
        self._cached: set[int] = set()
        self._awaited: dict[int, None] = {}  # blocks that prefixes rest on, not cached
        self._resting: dict[int, dict[int, None]] = {}  # the prefixes of each block
        self._held: dict[int, int] = {}  # on how many cached blocks each prefix rests
        self._news: dict[int, bool] = {}  # whether what changed is held now
        self._all_is_news = False

    # What the engine says

    def stored(
        self,
        blocks: Sequence[Hashable],
        parent: Hashable | None,
        token_ids: Sequence[int],
        adapter: str = "",
    ) -> None:
        """Blocks were filled and can be shared.

        Args:
            blocks: Their names in the engine, each after the one before.
            parent: The block before the first; None: there is none.
            token_ids: Of all of them; where that is no multiple of the block size, they are
                passed over.
            adapter: The LoRA adapter that they were computed with.
        """
        before = _root(adapter) if parent is None else self._keys.get(parent)
        if before is None or len(token_ids) != len(blocks) * self.block_size:
            return
        keys = list(self._chain(before, array("I", token_ids)))
        # Backwards here and in ``asked``: what is forgotten for want of room is a prompt's end.
        for block, key in zip(reversed(blocks), reversed(keys), strict=True):
            if block in self._keys:
                self._copies[block] = self._copies.get(block, 1) + 1
                continue
            self._keys[block] = key
            self._cached.add(key)
            self._awaited.pop(key, None)
            for prefix in self._resting.get(key, ()):
                self._hold(prefix)

    def removed(self, blocks: Iterable[Hashable]) -> None:
        """Blocks were evicted; who still waits for one of them will have it stored again."""
        for block in blocks:
            copies = self._copies.pop(block, 1)
            if copies > 2:
                self._copies[block] = copies - 1
            if copies > 1 or (key := self._keys.pop(block, None)) is None:
                continue
            self._cached.discard(key)
            if resting := self._resting.get(key):
                self._awaited[key] = None
                for prefix in resting:
                    self._let_go(prefix)
        self._forget_awaited()

    def cleared(self) -> None:
        """Nothing is cached any more."""
        self._keys.clear()
        self._copies.clear()
        self._cached.clear()
        self._resting.clear()
        self._awaited.clear()
        self._held.clear()
        self._tell_all()

    # What a request shows

    def asked(self, text: Fingerprint, token_ids: Sequence[int], adapter: str = "") -> None:
        """A prompt was ``text``, and ``token_ids`` to the engine."""
        num_blocks = len(token_ids) // self.block_size
        if not text.hashes or not num_blocks:
            return
        ids = array("I", token_ids)
        counts = self._leading_blocks(text, ids)
        used = ids[: counts[-1] * self.block_size]
        keys = list(self._chain(_root(adapter), used))
        for prefix, count in zip(reversed(text.hashes), reversed(counts), strict=True):
            self._rest(prefix, keys[count - 1])
        while len(self._held) > self._max_prefixes:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._tell(oldest, False)
        self._forget_awaited()

    # What routers are told

    def take_events(self) -> PrefixEvents | None:
        """What changed since the last call; None: nothing."""
        if self._all_is_news:
            self._all_is_news = False
            self._news.clear()
            return PrefixEvents(stored=self.snapshot(), cleared=True)
        if not self._news:
            return None
        news, self._news = self._news, {}
        return PrefixEvents(
            stored=[prefix for prefix, held in news.items() if held],
            removed=[prefix for prefix, held in news.items() if not held],
        )

    def snapshot(self) -> Sequence[int]:
        """The prefixes that are held now."""
        return list(self._held)

    # Inner

    def _chain(self, key: int, ids: "array[int]") -> Iterable[int]:
        """The key of each full block: a hash of its tokens and of all before them."""
        view, size = memoryview(ids), self.block_size
        for start in range(0, len(ids) - size + 1, size):
            key = digest(view[start : start + size], key)
            yield key

    def _leading_blocks(self, text: Fingerprint, ids: "array[int]") -> list[int]:
        """How many blocks lie within each prefix; 1 also where the first one is longer.

        A template adds text to a prompt. Where is not known, so it is spread over all of it.
        """
        ends: Any = np.array(text.ends, np.float64)
        if text.is_tokens:
            tokens = ends // _ID_BYTES
        else:
            before = np.cumsum(self._byte_lengths(np.frombuffer(ids, np.uint32)))
            tokens = np.searchsorted(before, ends * (before[-1] / text.total_bytes), side="right")
        most = len(ids) // self.block_size
        counts: list[int] = np.clip(tokens // self.block_size, 1, most).astype(int).tolist()
        return counts

    def _rest(self, prefix: int, key: int) -> None:
        """A prefix is held while the block with that key is cached."""
        resting = self._resting.setdefault(key, {})
        cached = key in self._cached
        if not cached:
            self._awaited.pop(key, None)
            self._awaited[key] = None
        if prefix in resting:
            if prefix in self._held:  # move it behind those asked for longer ago
                self._held[prefix] = self._held.pop(prefix)
                return
        elif len(resting) >= MAX_RESTING:
            return
        resting[prefix] = None
        if cached:
            self._hold(prefix)

    def _forget_awaited(self) -> None:
        while len(self._awaited) > MAX_AWAITED:
            oldest = next(iter(self._awaited))
            del self._awaited[oldest], self._resting[oldest]

    def _hold(self, prefix: int) -> None:
        count = self._held.pop(prefix, 0)
        self._held[prefix] = count + 1
        if not count:
            self._tell(prefix, True)

    def _let_go(self, prefix: int) -> None:
        count = self._held.get(prefix, 0)
        if count > 1:
            self._held[prefix] = count - 1
        elif count:
            del self._held[prefix]
            self._tell(prefix, False)

    def _tell(self, prefix: int, held: bool) -> None:
        if self._all_is_news:
            return
        self._news[prefix] = held
        if len(self._news) > MAX_NEWS:
            self._tell_all()
        elif len(self._news) == 1:
            self._call()

    def _tell_all(self) -> None:
        self._news.clear()
        if not self._all_is_news:
            self._all_is_news = True
            self._call()

    def _call(self) -> None:
        if self.on_change is not None:
            self.on_change()


def _root(adapter: str) -> int:
    return digest(adapter.encode())
