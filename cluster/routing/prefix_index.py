"""Index of the prompt prefixes that each replica has in its KV cache.

Replicas report the prefixes that they store and remove. A router adds the prefixes of the requests
that it placed as expectations, which end when the replica reports otherwise or after some seconds.
An entry maps a prefix's hash to a bit mask of replicas. Entries are spread over many small
dictionaries (shards), so that growing, searching or cleaning one never takes long. Knows nothing of
text, tokens or load.
"""

from collections.abc import Iterable, Sequence

MAX_ENTRIES = 2**20
SHARD_ENTRIES = 1024
"""Approximate size of a full shard; cleaning one takes about 50 µs."""
EXPECTED_S = 10.0
"""Longest life of an expectation, which lives at least half as long; above a long prefill."""
MAX_EXPECTED = 2**14
"""Expectations made within half of ``EXPECTED_S``; more drop the older half early."""
SWEEP_SHARDS = 16
"""Shards that are cleaned for each replica that is cleared."""
USED_STRIDE = 4
"""Marking an entry as used is a cache miss; those of frequent prompts are soon all marked."""
USED = 1
"""Lowest bit of a mask: the entry was used since it was last considered for eviction."""

EXACT_PROBES = 16
"""Look-ups after which ``PrefixIndex.find_levels`` becomes approximate. A look-up is a handful of
cache misses, about a microsecond of a decision."""
COARSE = 1 / 16
"""Error of an approximate count, as a share of the number of prefixes."""

Level = tuple[int, int]
"""A number of leading prefixes, and the mask of the replicas that hold at least as many."""


class PrefixIndex:
    """Index of at most ``max_entries`` prefix hashes; the least recently used ones are evicted."""

    def __init__(self, max_entries: int = MAX_ENTRIES, expected_s: float = EXPECTED_S) -> None:
        num_shards = 1 << max(0, (max_entries // SHARD_ENTRIES).bit_length() - 1)
        self._shards: list[dict[int, int]] = [{} for _ in range(num_shards)]
        self._shard_mask = num_shards - 1  # of a hash, gives its shard
        self._max_shard_entries = max(1, max_entries // num_shards)
        # Expectations made before and since the last rotation; a rotation drops the old ones.
        self._old_expected: dict[int, int] = {}
        self._young_expected: dict[int, int] = {}
        self._rotate_s = expected_s / 2
        self._rotated_s = 0.0
        self._used_offset = 0
        # Prompt and exact result of the last ``find_levels``, until the next update.
        self._found_prefixes: Sequence[int] | None = None
        self._found_levels: list[Level] = []
        self.version = 0
        """Grows when a replica gets or loses its bit."""
        self._masks: dict[str, int] = {}  # of each replica, with one bit set
        self._live_mask = 0
        # Bits of cleared replicas wait to be swept out of the shards before they are free again.
        self._cleared_mask = self._sweeping_mask = 0
        self._next_sweep_shard = 0
        self._free_masks: list[int] = []
        self.num_bits = 1  # the lowest one is USED
        """Bits ever used: the longest mask."""

    @property
    def num_entries(self) -> int:
        """Number of prefixes that replicas reported; expectations are not counted."""
        return sum(len(shard) for shard in self._shards)

    @property
    def num_expected(self) -> int:
        return len(self._old_expected) + len(self._young_expected)

    # -- updates --

    def advance(self, now_s: float) -> None:
        """Set the clock and drop expectations that are too old."""
        elapsed_s = now_s - self._rotated_s
        if 0.0 <= elapsed_s < self._rotate_s:
            return
        self._rotate_expected()
        if elapsed_s >= 2 * self._rotate_s:
            self._rotate_expected()
        self._rotated_s = now_s

    def add_stored(self, replica_id: str, hashes: Iterable[int]) -> None:
        self._found_prefixes = None
        mask = self._mask_of(replica_id)
        shards, shard_mask, limit = self._shards, self._shard_mask, self._max_shard_entries
        before = merged = 0  # equal masks along a prompt are one object, so one cache miss
        for prefix in hashes:
            shard = shards[prefix & shard_mask]
            holders = shard.get(prefix)
            if holders is None:
                if len(shard) >= limit:
                    _evict(shard)
                shard[prefix] = mask
            else:
                if holders is not before:
                    before, merged = holders, holders | mask | USED
                shard[prefix] = merged
        self._sweep(1)

    def remove_stored(self, replica_id: str, hashes: Iterable[int]) -> None:
        self._found_prefixes = None
        mask = self._masks.get(replica_id, 0)
        for prefix in hashes:
            for entries in (self._shard_of(prefix), self._old_expected, self._young_expected):
                if prefix in entries:
                    _unset(entries, prefix, mask)
        self._sweep(1)

    def clear(self, replica_id: str) -> None:
        """Forget all prefixes of a replica, which emptied its cache or is gone."""
        mask = self._masks.pop(replica_id, 0)
        if mask:
            self._found_prefixes = None
            self._live_mask &= ~mask
            self._cleared_mask |= mask
            self.version += 1
            self._sweep(SWEEP_SHARDS)

    def expect(self, replica_id: str, prefixes: Sequence[int], num_held: int = 0) -> None:
        """Expect a replica to have these prefixes, because it was given a prompt with them.

        Of those that it holds, every ``USED_STRIDE``-th counts as used, each time others.

        Args:
            replica_id: The replica.
            prefixes: Hashes of the prompt's prefixes.
            num_held: Number of leading prefixes that the replica holds, from ``count``.
        """
        self._found_prefixes = None
        mask, shards, shard_mask = self._mask_of(replica_id), self._shards, self._shard_mask
        self._used_offset = (self._used_offset + 1) % USED_STRIDE
        before = used = 0
        for prefix in prefixes[self._used_offset : num_held : USED_STRIDE]:
            shard = shards[prefix & shard_mask]
            holders = shard.get(prefix, 0)
            if holders and not holders & USED:
                if holders is not before:
                    before, used = holders, holders | USED
                shard[prefix] = used
        expected = dict.fromkeys(prefixes[num_held:], mask)
        if num_held and not self._has_stored(prefixes[num_held - 1], mask):
            old = self._old_expected  # held only as an expectation, which is renewed
            expected |= {prefix: mask for prefix in prefixes[:num_held] if prefix in old}
        young = self._young_expected
        if young.keys().isdisjoint(expected):  # the usual case, without a new mask per prefix
            young |= expected
        else:
            for prefix in expected:
                young[prefix] = young.get(prefix, 0) | mask
        if len(young) > MAX_EXPECTED:
            self._rotate_expected()

    # -- queries --

    def match(self, prefixes: Sequence[int]) -> dict[str, int]:
        """Return the number of leading prefixes that each replica holds, if it holds any."""
        counts: dict[str, int] = {}
        for count, holders in self.find_levels(prefixes):
            counts |= {name: count for name, mask in self._masks.items() if mask & holders}
        return counts

    def count(self, replica_id: str, prefixes: Sequence[int]) -> int:
        """Return the number of leading prefixes that one replica holds."""
        mask, low, high = self._masks.get(replica_id, 0), 0, len(prefixes)
        if prefixes is self._found_prefixes:
            for count, holders in reversed(self._found_levels):
                if holders & mask:
                    return count
            return 0
        while low < high:
            middle = (low + high) // 2
            if self._holders(prefixes[middle]) & mask:
                low = middle + 1
            else:
                high = middle
        return low

    def find_levels(self, prefixes: Sequence[int]) -> list[Level]:
        """Return ``match`` as masks, by rising counts; each mask is a subset of the one before.

        Engines evict the end of a prompt before its start. So if two prefixes have the same
        holders, those between them are assumed to have them too, and a bisection finds the levels
        in O(levels * log(prefixes)). The longest are found first; after ``EXACT_PROBES`` look-ups,
        the remaining counts may be too low by up to ``COARSE`` of all prefixes.
        """
        levels: list[Level] = []
        self._found_prefixes, self._found_levels = prefixes, levels
        if not prefixes or not (first := self._holders(prefixes[0])):
            return levels
        shards, shard_mask = self._shards, self._shard_mask
        old, young = self._old_expected, self._young_expected
        tolerance, num_probes = 1, 0
        # Holders of the prefix at ``low``, and of the one at ``high`` (none at the end).
        low, low_mask, high, high_mask = 0, first, len(prefixes), 0
        pending: list[tuple[int, int, int, int]] = []
        while True:
            while high - low > tolerance:
                middle = (low + high) // 2
                prefix = prefixes[middle]
                mask = shards[prefix & shard_mask].get(prefix, 0) & low_mask
                if mask != low_mask:
                    expected = old.get(prefix, 0) | young.get(prefix, 0)
                    mask |= expected & low_mask | high_mask
                num_probes += 1
                if num_probes == EXACT_PROBES:
                    tolerance = max(1, int(COARSE * len(prefixes)))
                    self._found_prefixes = None
                if mask == high_mask:
                    high = middle
                    continue
                if mask != low_mask:
                    pending.append((low, low_mask, middle, mask))
                low, low_mask = middle, mask
            levels.append((low + 1, low_mask))
            if not pending:
                break
            low, low_mask, high, high_mask = pending.pop()
        levels.reverse()
        return levels

    def bit_of(self, replica_id: str) -> int:
        """Return the position of a replica's bit in masks; 0, which is never set, if it has none.

        Valid for one ``version``.
        """
        return max(0, self._masks.get(replica_id, 0).bit_length() - 1)

    # -- internals --

    def _holders(self, prefix: int) -> int:
        expected = self._old_expected.get(prefix, 0) | self._young_expected.get(prefix, 0)
        return (self._shard_of(prefix).get(prefix, 0) | expected) & self._live_mask

    def _has_stored(self, prefix: int, mask: int) -> bool:
        """Return True if a replica reported that it holds a prefix."""
        return bool(self._shard_of(prefix).get(prefix, 0) & mask)

    def _shard_of(self, prefix: int) -> dict[int, int]:
        return self._shards[prefix & self._shard_mask]

    def _rotate_expected(self) -> None:
        self._found_prefixes = None
        self._old_expected, self._young_expected = self._young_expected, {}

    def _mask_of(self, replica_id: str) -> int:
        """Return a replica's mask; give it a bit if it has none."""
        mask = self._masks.get(replica_id)
        if mask is None:
            if not self._free_masks:
                self._free_masks.append(1 << self.num_bits)
                self.num_bits += 1
            mask = self._masks[replica_id] = self._free_masks.pop()
            self._live_mask |= mask
            self.version += 1
        return mask

    def _sweep(self, num_shards: int) -> None:
        """Remove cleared replicas' bits from some shards; free the bits after the last shard.

        Spread over other updates, because one pass over all entries would stall the router.
        """
        if self._next_sweep_shard == 0:
            self._sweeping_mask, self._cleared_mask = self._cleared_mask, 0
        if not self._sweeping_mask:
            return
        end = self._next_sweep_shard + num_shards
        for shard in self._shards[self._next_sweep_shard : end]:
            _unset_all(shard, self._sweeping_mask)
        self._next_sweep_shard = end
        if end < len(self._shards):
            return
        _unset_all(self._old_expected, self._sweeping_mask)
        _unset_all(self._young_expected, self._sweeping_mask)
        bits = range(self.num_bits)
        self._free_masks += [1 << bit for bit in bits if self._sweeping_mask >> bit & 1]
        self._next_sweep_shard = self._sweeping_mask = 0


def _unset(entries: dict[int, int], prefix: int, mask: int) -> None:
    """Remove holders from an entry; delete the entry if none is left."""
    holders = entries[prefix] & ~mask
    if holders > USED:
        entries[prefix] = holders
    else:
        del entries[prefix]


def _unset_all(entries: dict[int, int], mask: int) -> None:
    for prefix in [prefix for prefix, holders in entries.items() if holders & mask]:
        _unset(entries, prefix, mask)


def _evict(shard: dict[int, int]) -> None:
    """Evict the oldest entry that was not used; used ones get another round (CLOCK)."""
    while True:
        prefix = next(iter(shard))
        holders = shard.pop(prefix)
        if not holders & USED:
            return
        shard[prefix] = holders ^ USED
