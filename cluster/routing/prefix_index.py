"""Which prefixes of prompts each replica has in its KV cache.

Replicas say what they store and remove (``stored``, ``removed``, ``cleared``); a router adds what
it expects of the requests that it placed (``expect``), until the replica says otherwise or a time
has passed. An entry is a prefix's hash and a bit mask of the replicas that hold it, in many small
dictionaries, so that none of them is ever slow to grow, to search or to clean. Knows nothing of
text, tokens or load.
"""

from collections.abc import Iterable, Sequence

MAX_ENTRIES = 2**20
SHARD_ENTRIES = 1024
"""About how many entries a shard has at most; cleaning one takes some 50 µs."""
EXPECTED_S = 10.0
"""How long an expectation holds at most, and half of it at least: longer than a long prefill."""
MAX_EXPECTED = 2**14
"""Expectations that are made within half of that time; more let the older half go sooner."""
SWEEP_SHARDS = 16
"""Shards that are cleaned for each replica that is forgotten."""
USED = 1
"""The bit of an entry that was asked for since it was last passed over for eviction."""

EXACT_PROBES = 16
"""Look-ups after which ``PrefixIndex.levels`` is content with less: each is a handful of cache
misses, about a microsecond of a decision."""
COARSE = 1 / 16

Level = tuple[int, int]
"""A number of leading prefixes, and the mask of the replicas that hold at least as many."""


class PrefixIndex:
    """Prefix hashes of at most ``max_entries``; the least recently used ones make room."""

    def __init__(self, max_entries: int = MAX_ENTRIES, expected_s: float = EXPECTED_S) -> None:
        num_shards = 1 << max(0, (max_entries // SHARD_ENTRIES).bit_length() - 1)
        self._shards: list[dict[int, int]] = [{} for _ in range(num_shards)]
        self._pick = num_shards - 1
        self._shard_max = max(1, max_entries // num_shards)
        self._expected: dict[int, int] = {}
        self._expected_young: dict[int, int] = {}  # of these, what was made since the last turn
        self._turn_s = expected_s / 2
        self._turned_at = 0.0
        self.version = 0
        """Grows when a replica gets another bit."""
        self._bits: dict[str, int] = {}  # each replica's mask, of one bit
        self._live = 0
        self._free: list[int] = []
        self._num_bits = 1  # the lowest one is USED
        self._retired = self._leaving = 0
        self._swept = 0

    @property
    def num_entries(self) -> int:
        """Prefixes that some replica was said to have; expectations are not counted."""
        return sum(len(shard) for shard in self._shards)

    # What is told

    def advance(self, now_s: float) -> None:
        """Say what time it is; expectations that are too old are dropped."""
        elapsed = now_s - self._turned_at
        if 0.0 <= elapsed < self._turn_s:
            return
        self._turn()
        if elapsed >= 2 * self._turn_s:
            self._turn()
        self._turned_at = now_s

    def stored(self, replica_id: str, hashes: Iterable[int]) -> None:
        """A replica has stored these prefixes."""
        bit = self._bit(replica_id)
        shards, pick, most = self._shards, self._pick, self._shard_max
        for prefix in hashes:
            shard = shards[prefix & pick]
            held = shard.get(prefix)
            if held is None:
                if len(shard) >= most:
                    _evict(shard)
                shard[prefix] = bit
            else:
                shard[prefix] = held | bit | USED
        self._sweep(1)

    def removed(self, replica_id: str, hashes: Iterable[int]) -> None:
        """A replica no longer has these prefixes."""
        bit = self._bits.get(replica_id, 0)
        for prefix in hashes:
            for entries in (self._shard(prefix), self._expected, self._expected_young):
                if prefix in entries:
                    _take(entries, prefix, bit)
        self._sweep(1)

    def cleared(self, replica_id: str) -> None:
        """A replica has nothing stored any more."""
        bit = self._bits.pop(replica_id, 0)
        if bit:
            self._live &= ~bit
            self._retired |= bit
            self.version += 1
            self._sweep(SWEEP_SHARDS)

    def forget(self, replica_id: str) -> None:
        """A replica is gone."""
        self.cleared(replica_id)

    def expect(self, replica_id: str, prefix: Iterable[int]) -> None:
        """A replica is given a prompt with these prefixes, so it has or will soon have them.

        What it is known to have counts as used.
        """
        bit, shards, pick = self._bit(replica_id), self._shards, self._pick
        expected, young = self._expected, self._expected_young
        for each in prefix:
            shard = shards[each & pick]
            held = shard.get(each, 0)
            if held and not held & USED:
                shard[each] = held | USED
            if not held & bit:
                expected[each] = expected.get(each, 0) | bit
                young[each] = young.get(each, 0) | bit
        if len(young) > MAX_EXPECTED:
            self._turn()

    # What is asked

    def match(self, prefix: Sequence[int]) -> dict[str, int]:
        """How many leading prefixes each replica holds, of those that hold any."""
        counts: dict[str, int] = {}
        for count, mask in self.levels(prefix):
            counts |= {name: count for name, bit in self._bits.items() if bit & mask}
        return counts

    def count(self, replica_id: str, prefix: Sequence[int]) -> int:
        """How many leading prefixes one replica holds."""
        bit, low, high = self._bits.get(replica_id, 0), 0, len(prefix)
        while low < high:
            middle = (low + high) // 2
            if self._holders(prefix[middle]) & bit:
                low = middle + 1
            else:
                high = middle
        return low

    def levels(self, prefix: Sequence[int]) -> list[Level]:
        """The same as ``match`` with masks: counts rise, and each mask is part of the one before.

        An engine evicts the end of a prompt before its beginning, so where two prefixes are held
        by the same replicas, all between them are taken to be: the time is the number of levels
        times the logarithm of the number of prefixes. The longest are sought first; where there
        are many levels, the counts of shorter ones are less by up to ``COARSE`` of all prefixes.
        """
        if not prefix or not (first := self._holders(prefix[0])):
            return []
        shards, pick, expected = self._shards, self._pick, self._expected
        levels: list[Level] = []
        exact, num_probes = 1, 0
        at, held, end, at_end = 0, first, len(prefix), 0
        to_do: list[tuple[int, int, int, int]] = []
        while True:  # who holds the one at ``at``, and who the one at ``end``
            while end - at > exact:
                middle = (at + end) // 2
                each = prefix[middle]
                found = shards[each & pick].get(each, 0) & held
                if found != held:
                    found |= expected.get(each, 0) & held | at_end
                num_probes += 1
                if num_probes == EXACT_PROBES:
                    exact = max(1, int(COARSE * len(prefix)))
                if found == at_end:
                    end = middle
                    continue
                if found != held:
                    to_do.append((at, held, middle, found))
                at, held = middle, found
            levels.append((at + 1, held))
            if not to_do:
                break
            at, held, end, at_end = to_do.pop()
        levels.reverse()
        return levels

    def bit_of(self, replica_id: str) -> int:
        """The place of a replica's bit in masks, for this ``version``; 0, never set: has none."""
        return max(0, self._bits.get(replica_id, 0).bit_length() - 1)

    def _holders(self, prefix: int) -> int:
        return (self._shard(prefix).get(prefix, 0) | self._expected.get(prefix, 0)) & self._live

    # Inner

    def _shard(self, prefix: int) -> dict[int, int]:
        return self._shards[prefix & self._pick]

    def _turn(self) -> None:
        self._expected, self._expected_young = self._expected_young, {}

    def _bit(self, replica_id: str) -> int:
        """A replica's mask; a new one where nothing was heard of it since it was cleared."""
        bit = self._bits.get(replica_id)
        if bit is None:
            if not self._free:
                self._free.append(1 << self._num_bits)
                self._num_bits += 1
            bit = self._bits[replica_id] = self._free.pop()
            self._live |= bit
            self.version += 1
        return bit

    def _sweep(self, num_shards: int) -> None:
        """Take the bits of replicas that are gone out of some shards; at the end they are free.

        Spread over what else happens, since a pass over all entries would hold everything up.
        """
        if self._swept == 0:
            self._leaving, self._retired = self._retired, 0
        if not self._leaving:
            return
        for shard in self._shards[self._swept : self._swept + num_shards]:
            _take_all(shard, self._leaving)
        self._swept += num_shards
        if self._swept < len(self._shards):
            return
        _take_all(self._expected, self._leaving)
        _take_all(self._expected_young, self._leaving)
        self._free += [1 << at for at in range(self._num_bits) if self._leaving >> at & 1]
        self._swept = self._leaving = 0


def _take(entries: dict[int, int], prefix: int, bits: int) -> None:
    """Take bits out of an entry; one that nobody holds goes."""
    held = entries[prefix] & ~bits
    if held > USED:
        entries[prefix] = held
    else:
        del entries[prefix]


def _take_all(entries: dict[int, int], bits: int) -> None:
    for prefix in [prefix for prefix, held in entries.items() if held & bits]:
        _take(entries, prefix, bits)


def _evict(shard: dict[int, int]) -> None:
    """Drop the oldest entry that was not used; those that were get another turn (CLOCK)."""
    while True:
        prefix = next(iter(shard))
        held = shard.pop(prefix)
        if not held & USED:
            return
        shard[prefix] = held ^ USED
